"""A Linear layer whose weight is a tensor train: the module, and the stage of its chain.

Novikov et al. 2015, "Tensorizing Neural Networks", section 4: the TT-layer.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tdecomp.layers.geometry import Call

Shape = tuple[int, ...]
# An axis of the tensor between two steps: of the batch, of the inputs or outputs of one core, or
# a rank, by the number of the core on its left.
_Axis = tuple[str, int]
_BATCH: _Axis = ("batch", 0)


class Step(NamedTuple):
    """One core multiplied into the tensor; its own open axes go to the end."""

    core: int
    dims: list[int]  # of the tensor that are summed over
    core_dims: list[int]  # of the core, in the same order


class Contraction(NamedTuple):
    """The order in which an input is multiplied by the cores."""

    steps: tuple[Step, ...]
    order: list[int]  # of the axes at the end: the batch, and the outputs of each core
    macs: int  # of one input vector


@lru_cache(4096)
def cheapest_contraction(out_shape: Shape, in_shape: Shape, ranks: Shape) -> Contraction:
    """The order with the fewest multiply-accumulates in which cores are contracted one by one.

    All orders are compared, by the set of the cores that are done (dynamic programming).
    """
    count = len(in_shape)
    bonds = (1, *ranks, 1)
    sizes = {_BATCH: 1} | {("rank", k): rank for k, rank in enumerate(bonds)}
    sizes |= {("in", k): n for k, n in enumerate(in_shape)}
    sizes |= {("out", k): n for k, n in enumerate(out_shape)}
    # By the cores that are done: the MACs so far, and the order of the cores.
    best: dict[frozenset[int], tuple[int, Shape]] = {frozenset(): (0, ())}
    for _ in range(count):
        found: dict[frozenset[int], tuple[int, Shape]] = {}
        for done, (macs, cores) in best.items():
            # Among equals the last core first: the inputs of a row need not be moved for it.
            for k in sorted({*range(count)} - done, reverse=True):
                axes = _open_axes(done, count)
                free = [sizes[axis] for axis in axes if axis not in _core_axes(k)]
                step = math.prod(free) * math.prod(sizes[axis] for axis in _core_axes(k))
                candidate = (macs + step, (*cores, k))
                if done | {k} not in found or candidate[0] < found[done | {k}][0]:
                    found[done | {k}] = candidate
        best = found
    ((macs, cores),) = best.values()
    return _contraction(cores, macs)


def _core_axes(k: int) -> list[_Axis]:
    """The axes of a core (rank, out, in, rank)."""
    return [("rank", k), ("out", k), ("in", k), ("rank", k + 1)]


def _open_axes(done: frozenset[int], count: int) -> set[_Axis]:
    """The axes of the tensor once these cores are contracted."""
    axes = {_BATCH} | {("out" if k in done else "in", k) for k in range(count)}
    ends = [k + side for k in done for side in (0, 1)]
    return axes | {("rank", k) for k in ends if ends.count(k) == 1}


def _contraction(cores: Sequence[int], macs: int) -> Contraction:
    count = len(cores)
    axes = [_BATCH, *(("in", k) for k in range(count))]
    steps = []
    for k in cores:
        mine = _core_axes(k)
        shared = [axis for axis in axes if axis in mine]
        steps.append(Step(k, [axes.index(a) for a in shared], [mine.index(a) for a in shared]))
        axes = [a for a in axes if a not in shared] + [a for a in mine if a not in shared]
    outputs = [_BATCH, *(("out", k) for k in range(count))]
    outputs += [axis for axis in axes if axis not in outputs]  # the outer ranks, which are 1
    return Contraction(tuple(steps), [axes.index(axis) for axis in outputs], macs)


class TTLinear(nn.Module):
    """A Linear layer by the cores of its weight, which is never formed.

    >>> from tdecomp.layers.tensor_train import TTLinear
    >>> layer = TTLinear((6, 4), (4, 8), (5,), bias=False)     # 32 inputs, 24 outputs, rank 5
    >>> [tuple(core.shape) for core in layer.cores], layer(torch.zeros(7, 32)).shape
    ([(1, 6, 4, 5), (5, 4, 8, 1)], torch.Size([7, 24]))

    Novikov et al. 2015, "Tensorizing Neural Networks", section 4: inputs and outputs are tensors of
    the shapes `in_shape` and `out_shape`; core k is (rank before, out, in, rank behind).
    """

    def __init__(
        self,
        out_shape: Shape,
        in_shape: Shape,
        ranks: Shape,
        bias: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = math.prod(in_shape), math.prod(out_shape)
        self.out_shape, self.in_shape, self.ranks = out_shape, in_shape, ranks
        sizes = zip((1, *ranks), out_shape, in_shape, (*ranks, 1), strict=True)
        empty = [torch.empty(size, device=device, dtype=dtype) for size in sizes]
        self.cores = nn.ParameterList(map(nn.Parameter, empty))
        values = torch.empty(self.out_features, device=device, dtype=dtype)
        self.bias = nn.Parameter(values) if bias else None
        found = cheapest_contraction(out_shape, in_shape, ranks)
        self._split = [-1, *in_shape]
        self._steps = [step.core for step in found.steps]
        self._dims = [[step.dims, step.core_dims] for step in found.steps]
        self._order = found.order

    def forward(self, x: Tensor) -> Tensor:
        cores = [core for core in self.cores]  # noqa: C416  as torch.jit.script needs it
        y = x.reshape(self._split)  # (batch, *in_shape)
        for at, dims in zip(self._steps, self._dims):  # noqa: B905  nor does it know strict=
            # In autocast the first product is in lower precision, and so are the others then.
            core = cores[at] if at == self._steps[0] else cores[at].to(y.dtype)
            y = torch.tensordot(y, core, dims)
        shape = list(x.shape[:-1]) + [self.out_features]  # noqa: RUF005  nor this
        y = y.permute(self._order).reshape(shape)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        into, out = ("·".join(map(str, shape)) for shape in (self.in_shape, self.out_shape))
        return f"{into} → {out}, ranks={self.ranks}, bias={self.bias is not None}"


@dataclass(frozen=True)
class TTStage:
    """The only stage of a tensor train's chain: a `TTLinear`."""

    out_shape: Shape
    in_shape: Shape
    ranks: Shape
    bias: bool

    @property
    def in_channels(self) -> int:
        return math.prod(self.in_shape)

    @property
    def out_channels(self) -> int:
        return math.prod(self.out_shape)

    @cached_property
    def params(self) -> int:
        sizes = zip((1, *self.ranks), self.out_shape, self.in_shape, (*self.ranks, 1), strict=True)
        return sum(map(math.prod, sizes)) + (self.out_channels if self.bias else 0)

    def macs(self, call: Call) -> int:
        return call.batch * cheapest_contraction(self.out_shape, self.in_shape, self.ranks).macs

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        return size

    def build(
        self, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> TTLinear:
        return TTLinear(self.out_shape, self.in_shape, self.ranks, self.bias, device, dtype)

    def put(self, module: Any, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for core, value in zip(module.cores, values, strict=True):
                core.copy_(value)

    def read(self, module: Any) -> tuple[Tensor, ...]:
        return tuple(core.detach().double() for core in module.cores)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def words(self) -> tuple[str, ...]:
        """For drawings."""
        into, out = ("·".join(map(str, shape)) for shape in (self.in_shape, self.out_shape))
        return (
            f"{len(self.in_shape)} cores",
            f"{self.in_channels} → {self.out_channels}",
            (f"{into} → {out}"),
        )
