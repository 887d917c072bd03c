"""The tensor train of a Linear layer's weight: one module that multiplies by small cores.

Novikov et al. 2015, "Tensorizing Neural Networks".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.factors import Factors, better
from tdecomp.layers.chain import Rank
from tdecomp.layers.spec import LayerSpec
from tdecomp.layers.tensor_train import Shape, TTStage
from tdecomp.linalg.randomized_svd import randomized_vectors
from tdecomp.linalg.second_moment import SecondMoment, is_wide
from tdecomp.linalg.spectrum import tails
from tdecomp.linalg.tensor_train import balanced, in_product_norm, padded, swept
from tdecomp.linalg.tensorly_backend import tt_matrix, tt_svd

# The order in which to contract more cores takes too long to find.
_MOST_CORES = 8
_SWEEPS, _DRAFT_SWEEPS = 8, 1
# A draft is only compared with other drafts, for which a sketch of small matrices is good enough.
_SKETCH = partial(randomized_vectors, smallest_side=64)
# At least as many times the rank is the side of a matrix whose singular vectors a sketch finds.
_LOW = 8
# How many shapes a refusal names.
_NAMED = 3


@dataclass(frozen=True)
class TTFactors(Factors):
    """A matrix (out, in) as a tensor train."""

    cores: tuple[Tensor, ...]  # (rank before, out, in, rank behind)

    def to_kernel(self) -> Tensor:
        return tt_matrix(self.cores)

    def stage_weights(self) -> tuple[Any, ...]:
        return (self.cores,)  # of the only stage

    def scaled(self, scale: float) -> "TTFactors":
        share = scale ** (1 / len(self.cores))
        return TTFactors(tuple(core * share for core in self.cores))

    def balanced(self) -> "TTFactors":
        return TTFactors(tuple(balanced(self.cores)))


@dataclass(frozen=True)
class TT(Decomposer):
    """A Linear layer becomes one module, which multiplies by the cores of a tensor train.

    >>> method, spec = TT(), LayerSpec.of(nn.Linear(512, 2048))
    >>> method.shapes(spec), method.max_rank(spec), method.stages(spec, 8)[0].params
    (((64, 32), (16, 32)), 1024, 18432)

    The inputs are a tensor of the shape `in_shape`, the outputs one of `out_shape`; core k sees one
    mode of each and is joined to the next one by rank k. Two cores of rank R are a sum of R
    Kronecker products.

    Novikov et al. 2015, "Tensorizing Neural Networks": the train of a matrix is equation 3, the
    layer equation 5. TT-SVD: Oseledets 2011, "Tensor-Train Decomposition", algorithm 1; for two
    cores it is the optimum (Van Loan and Pitsianis 1993, "Approximation with Kronecker Products").

    Parameters
    ----------
    in_shape, out_shape : tuple of int, optional
        Sizes whose products are the layer's inputs and outputs, one for each core; other layers
        are left alone. By default as nearly equal as the number allows, the largest of the outputs
        beside the smallest of the inputs, which needs the fewest weights.
    cores : int
        From 2 to 8. With two there is one rank; with more a tuple of one less than there are cores,
        and an int is the most that each rank may be.

    Raises
    ------
    ValueError
        If an option is out of range, or a shape has not as many sizes as there are cores.
    """

    name = "tt"
    source = "Novikov et al. 2015"
    iterative = True
    int_rank_caps = True
    last_mixes_outputs = False
    drafts_cost_less = True
    draft_products = 6

    in_shape: tuple[int, ...] | None = None
    out_shape: tuple[int, ...] | None = None
    cores: int = 2

    def __post_init__(self) -> None:
        if type(self.cores) is not int or not 2 <= self.cores <= _MOST_CORES:
            raise ValueError(f"tt: expected cores from 2 to {_MOST_CORES}, got {self.cores!r}")
        for name in ("in_shape", "out_shape"):
            shape = getattr(self, name)
            if shape is None:
                continue
            sizes = tuple(shape) if isinstance(shape, (tuple, list)) else ()
            if len(sizes) != self.cores or any(type(n) is not int or n < 1 for n in sizes):
                raise ValueError(
                    f"tt: expected {name} to have a positive whole number for each of "
                    f"cores={self.cores}, got {shape!r}"
                )
            object.__setattr__(self, name, sizes)

    def shapes(self, spec: LayerSpec) -> tuple[Shape, Shape]:
        """The shapes (out_shape, in_shape) for a layer that the method takes."""
        return self._shapes(spec.group_out, spec.group_in)

    def _shapes(self, out: int, into: int) -> tuple[Shape, Shape]:
        out_shape, in_shape = self.out_shape, self.in_shape
        if in_shape is None:
            in_shape = shapes_of(into, self.cores)[0]
            if out_shape is not None:
                in_shape = _opposite(in_shape, out_shape)
        return out_shape or _opposite(shapes_of(out, self.cores)[0], in_shape), in_shape

    def refusal(self, spec: LayerSpec) -> str | None:
        if spec.ndim or spec.groups > 1:
            return "tt takes Linear layers"
        sides = (("in_shape", self.in_shape, spec.in_channels, "inputs"),
                 ("out_shape", self.out_shape, spec.out_channels, "outputs"))  # fmt: skip
        for name, shape, size, what in sides:
            if shape is not None and math.prod(shape) != size:
                others = ", ".join(map(str, shapes_of(size, self.cores)[:_NAMED]))
                return (
                    f"tt: {name}={shape} has the product {math.prod(shape)}, the layer has {size} "
                    f"{what}; {name} could be {others} in any order, or None"
                )
        pairs = [*zip(*self.shapes(spec), strict=True)]
        sizes = f"{spec.in_channels}→{spec.out_channels}"
        if (1, 1) in pairs:
            return f"tt: {sizes} has too few factors for {self.cores} cores"
        if self.cores == 2 and all(1 in pair for pair in pairs) and _halved(pairs):
            return f"tt: {sizes} has no factors, so that its train would be the chain of svd"
        return None

    def max_rank(self, spec: LayerSpec) -> Rank:
        sizes = [o * i for o, i in zip(*self.shapes(spec), strict=True)]
        ends = range(1, len(sizes))
        ranks = tuple(min(math.prod(sizes[:end]), math.prod(sizes[end:])) for end in ends)
        return ranks[0] if self.cores == 2 else ranks

    def stages(self, spec: LayerSpec, rank: Rank) -> tuple[TTStage]:
        return (TTStage(*self.shapes(spec), _ranks(rank), spec.bias),)

    def fit(
        self, kernel: Tensor, rank: Rank, start: Factors | None = None, *, draft: bool = False
    ) -> TTFactors:
        del start  # TT-SVD, which sweeps begin with, costs less than a sweep
        ranks = _ranks(rank)
        sketch = _SKETCH if draft else randomized_vectors
        cores = padded(tt_svd(self._tensor(kernel), ranks, randomized=sketch), ranks)
        if self.cores > 2:  # of two cores it is the optimum
            cores = swept(kernel, cores, None, _DRAFT_SWEEPS if draft else _SWEEPS)
        factors = TTFactors(tuple(cores))
        return factors if draft else factors.balanced()

    def fit_to(
        self,
        kernel: Tensor,
        rank: Rank,
        moment: SecondMoment,
        start: Factors | None = None,
        *,
        draft: bool = False,
    ) -> TTFactors:
        # Single precision is enough to begin with where more than round-off is lost.
        ranks, side = _ranks(rank), math.isqrt(kernel.numel())
        low = is_wide(side) and _LOW * max(ranks) <= side
        quick = kernel.float() if draft or low else kernel
        sketch = _SKETCH if draft else randomized_vectors
        by_mode = in_product_norm(self._tensor(quick), moment, ranks, randomized=sketch)
        by_mode = padded(by_mode, ranks)
        if draft:
            cores = swept(quick, by_mode, moment, _DRAFT_SWEEPS)
            return TTFactors(tuple(core.double() for core in cores))
        begin: Factors = TTFactors(tuple(core.double() for core in by_mode))
        if start is not None:
            begin = better(kernel, moment, begin, start)
        assert isinstance(begin, TTFactors)
        found = TTFactors(tuple(swept(kernel, begin.cores, moment, _SWEEPS)))
        other = start or self.fit(quick, rank).to(torch.float64)
        chosen = better(kernel, moment, found.balanced(), other.balanced())
        assert isinstance(chosen, TTFactors)
        return chosen

    def lost_at_every_rank(
        self, kernel: Tensor, moment: SecondMoment | None, importance: Tensor | None = None
    ) -> Tensor | None:
        # In the norm of data, and with more cores, a fit does not contain those of lower ranks.
        if self.cores > 2 or moment is not None or importance is not None:
            return None
        return tails(self.unfoldings(kernel)[0])

    def factors_of(self, stage_weights: tuple[Any, ...]) -> TTFactors:
        (cores,) = stage_weights
        return TTFactors(tuple(cores))

    def unfoldings(self, kernel: Tensor) -> tuple[Tensor, ...]:
        tensor, count = self._tensor(kernel), self.cores
        order = [mode for pair in zip(range(count), range(count, 2 * count), strict=True)
                 for mode in pair]  # fmt: skip
        joined = tensor.permute(order)  # (out, in, out, in, …)
        return tuple(joined.flatten(0, 2 * k - 1).flatten(1) for k in range(1, count))

    def _tensor(self, kernel: Tensor) -> Tensor:
        """A kernel (out, in) as (*out_shape, *in_shape)."""
        out_shape, in_shape = self._shapes(*kernel.shape)
        return kernel.reshape(*out_shape, *in_shape)


def _ranks(rank: Rank) -> tuple[int, ...]:
    return rank if isinstance(rank, tuple) else (rank,)


def _halved(pairs: Sequence[tuple[int, int]]) -> bool:
    """Whether one of two cores has all outputs and the other one all inputs."""
    (out, into), (other_out, other_in) = pairs
    return (out, other_in) == (1, 1) or (into, other_out) == (1, 1)


def _opposite(sizes: Shape, others: Shape) -> Shape:
    """The sizes in an order in which the largest one stands beside the smallest of the others."""
    places = sorted(range(len(others)), key=lambda k: (others[k], k))
    arranged = dict(zip(places, sorted(sizes, reverse=True), strict=True))
    return tuple(arranged[k] for k in range(len(sizes)))


@lru_cache(1024)
def shapes_of(size: int, count: int, least: int = 1) -> tuple[Shape, ...]:
    """All ascending shapes with this product, the most nearly equal sizes first.

    >>> from tdecomp.decomposers.tt import shapes_of
    >>> shapes_of(24, 2)
    ((4, 6), (3, 8), (2, 12), (1, 24))
    """
    if count == 1:
        return ((size,),)
    found = [
        (first, *rest)
        for first in range(least, round(size ** (1 / count)) + 1)
        if size % first == 0 and first**count <= size
        for rest in shapes_of(size // first, count - 1, first)
    ]
    return tuple(sorted(found, key=sum))
