"""Tucker-2: a small core convolution between two pointwise ones.

Kim et al. 2016, "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
Applications", section 3.1.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from tdecomp.decomposers.base import DRAFT_ITERATIONS, Iterative
from tdecomp.decomposers.factors import Factors
from tdecomp.layers.chain import Rank
from tdecomp.layers.spec import LayerSpec
from tdecomp.linalg.features import SpanFeatures
from tdecomp.linalg.least_squares import SeparableFit
from tdecomp.linalg.second_moment import SecondMoment
from tdecomp.linalg.svd import leading_vectors, truncated_svd
from tdecomp.linalg.tensorly_backend import mode_products, unfold

# For drafts, which are only compared with one another, and fits that start near their end.
_LEAST_TOL = 1e-3
# An iteration of L-BFGS gains less than a sweep, so that a fit to data waits longer.
_FINER = 1e-3


@dataclass(frozen=True)
class Tucker2Factors(Factors):
    """A kernel as a core multiplied by a factor on each channel mode."""

    core: Tensor  # (R4, R3, *kernel)
    into: Tensor  # (in, R3)
    out: Tensor  # (out, R4)

    def to_kernel(self) -> Tensor:
        return mode_products(self.core, [self.out, self.into], modes=[0, 1])

    def stage_weights(self) -> tuple[Tensor, ...]:
        ones = [1] * (self.core.dim() - 2)
        first = self.into.T.reshape(*self.into.T.shape, *ones)  # (R3, in, 1, 1)
        last = self.out.reshape(*self.out.shape, *ones)  # (out, R4, 1, 1)
        return first, self.core, last

    def squared_norm(self) -> Tensor:
        grams = [self.out.T @ self.out, self.into.T @ self.into]
        return (self.core * mode_products(self.core, grams, modes=[0, 1])).sum()

    def scaled(self, scale: float) -> "Tucker2Factors":
        share = scale ** (1 / 3)
        return Tucker2Factors(self.core * share, self.into * share, self.out * share)


def _error(core: Tensor, power: float) -> float:
    """The relative error of orthonormal factors, of a kernel whose squares sum to `power`."""
    return math.sqrt(max(1.0 - float(core.square().sum(dtype=torch.float64)) / power, 0.0))


def _reduced(unfolding: Tensor, factor: Tensor, other: int) -> Tensor:
    """A kernel's unfolding times that mode's factor, unfolded along the mode of size `other`."""
    product = factor.T @ unfolding  # (R, other · kernel)
    return product.reshape(len(product), other, -1).transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class Tucker2(Iterative):
    """Conv S→T becomes pointwise S→R3, K×K R3→R4 and pointwise R4→T with the bias.

    >>> Tucker2().max_rank(LayerSpec(16, 32, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0)))
    (16, 32)

    Kim et al. 2016, "Compression of Deep Convolutional Neural Networks for Fast and Low Power
    Mobile Applications", section 3.1.

    Parameters
    ----------
    n_iter_max : int
        Sweeps at most.
    tol : float
        Stops when the relative reconstruction error changes by less from one sweep to the next.

    Raises
    ------
    ValueError
        If `n_iter_max` is below 1 or `tol` below 0.
    """

    name = "tucker2"
    source = "Kim et al. 2016"

    draft_iterations = 3  # from a start that is in the norm of the data already

    n_iter_max: int = 100
    tol: float = 1e-4

    def refusal(self, spec: LayerSpec) -> str | None:
        return None if spec.ndim else "tucker2 takes convolutions; svd takes Linear layers"

    def max_rank(self, spec: LayerSpec) -> tuple[int, int]:
        into, out, volume = spec.group_in, spec.group_out, spec.kernel_volume
        return min(into, out * volume), min(out, into * volume)

    def stages(self, spec: LayerSpec, rank: Rank) -> tuple[LayerSpec, ...]:
        assert isinstance(rank, tuple)
        middle_in, middle_out = (r * spec.groups for r in rank)
        core = spec.like(in_channels=middle_in, out_channels=middle_out, bias=False)
        last = spec.pointwise(middle_out, spec.out_channels, bias=spec.bias)
        return spec.pointwise(spec.in_channels, middle_in), core, last

    def fit(
        self, kernel: Tensor, rank: Rank, start: Factors | None = None, *, draft: bool = False
    ) -> Tucker2Factors:
        # Higher-order orthogonal iteration: each factor in turn is the best one for the other
        # (De Lathauwer et al. 2000, "On the best rank-1 and rank-(R1, …, RN) approximation of
        # higher-order tensors", algorithm 4.2).
        del start  # the higher-order SVD that sweeps begin with costs less than a sweep
        assert isinstance(rank, tuple)
        rank_in, rank_out = rank
        method = self.limited(DRAFT_ITERATIONS) if draft else self
        by_out = unfold(kernel, 0)  # (out, in · kernel)
        by_in = unfold(kernel, 1)  # (in, out · kernel)
        out, lost_out = leading_vectors(by_out, rank_out)
        into, lost_in = leading_vectors(by_in, rank_in)
        reduced = _reduced(by_in, into, len(out))  # (out, R3 · kernel)
        core = out.T @ reduced  # (R4, R3 · kernel)
        power = float(by_out.square().sum(dtype=torch.float64)) or 1.0
        # No factors of these ranks lose less than either unfolding does alone. The start loses at
        # most what both lose together (De Lathauwer et al. 2000, "A multilinear singular value
        # decomposition", property 10), which round-off may hide.
        least = math.sqrt(max(lost_out, lost_in))
        error = min(_error(core, power), math.sqrt(lost_out + lost_in))
        for _ in range(method.n_iter_max):
            if error - least <= method.tol:
                break
            out, _ = leading_vectors(reduced, rank_out)
            into, _ = leading_vectors(_reduced(by_out, out, len(into)), rank_in)
            reduced = _reduced(by_in, into, len(out))
            core = out.T @ reduced
            before, error = error, _error(core, power)
            if abs(before - error) < method.tol:
                break
        return Tucker2Factors(core.reshape(rank_out, rank_in, *kernel.shape[2:]), into, out)

    def fitted(
        self,
        kernel: Tensor,
        rank: Rank,
        moment: SecondMoment,
        start: Tucker2Factors | None,
        *,
        draft: bool,
    ) -> Tucker2Factors:
        # Given the factor of the input channels, core and output factor together are a regression
        # of limited rank, which is solved in closed form.
        assert isinstance(rank, tuple)
        rank_in, rank_out = rank
        features = SpanFeatures(kernel.shape[1], math.prod(kernel.shape[2:]))
        matrix = kernel.flatten(1)
        begin = features.start(matrix, moment, rank_in) if start is None else start.into
        fit = SeparableFit(matrix, moment, features, rank_out)
        tol = self.tol * _FINER
        factor, (channels,) = fit.minimise(
            [begin], n_iter_max=self.n_iter_max, tol=tol, draft=draft
        )
        into = torch.linalg.qr(channels).Q
        out, s, core = truncated_svd(factor, rank_out)  # (out, R4), (R4,), (R4, kernel · R3)
        core = (s[:, None] * core).reshape(len(s), *kernel.shape[2:], -1).movedim(-1, 1)
        missing = rank_out - len(core)
        if missing > 0:  # more ranks than the regression has: nothing is left for the others to do
            core = torch.cat([core, core.new_zeros(missing, *core.shape[1:])])
            out = torch.cat([out, out.new_zeros(len(out), missing)], dim=1)
        return Tucker2Factors(core, into, out)

    def contained_in(self, spec: LayerSpec) -> tuple[str, ...]:
        return ("svd", "lowrank", "spatial") if spec.kernel_volume == 1 else ()

    def limited(self, iterations: int) -> Self:
        return replace(super().limited(iterations), tol=max(self.tol, _LEAST_TOL))

    def factors_of(self, stage_weights: tuple[Tensor, ...]) -> Tucker2Factors:
        first, core, last = stage_weights
        return Tucker2Factors(core, first.flatten(1).T, last.flatten(1))

    def unfoldings(self, kernel: Tensor) -> tuple[Tensor, ...]:
        return unfold(kernel, 1), unfold(kernel, 0)
