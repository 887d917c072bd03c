"""Ranks and fits of single kernels, compared with plain NumPy and TensorLy.

Both are judged by the same relative error. Kernels are Gaussian, with a flat spectrum, which is the
slow case for every method, or have a spectrum that falls as those of trained layers do.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import tensorly
import torch
from tensorly.decomposition import parafac, partial_tucker
from torch import Tensor

from benchmarks.support.pairs import in_turns, row
from benchmarks.support.today import quiet_tensorly
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.cp import CPSeparable
from tdecomp.decomposers.fit_layer import factorize, relative_error, spectra_of
from tdecomp.decomposers.registry import get_decomposer
from tdecomp.layers.spec import LayerSpec
from tdecomp.linalg.evb import evb_rank

KERNELS = ("gaussian", "falling")
Found = Tensor | tuple[int, ...]


@dataclass(frozen=True)
class Way:
    """One of our ways to solve a problem, and its bounds relative to the plain one."""

    find: Callable[[Tensor], Found]
    times_faster: float
    worse: float | None = None


@dataclass(frozen=True)
class Case:
    """A problem, our ways to solve it (keys are appended to the title), and the plain one."""

    title: str
    channels: int
    ours: Mapping[str, Way]
    plain: Callable[[Tensor], Found]


def kernel(channels: int, kind: str) -> Tensor:
    """A kernel (channels, channels, 3, 3) of one of the two kinds."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(channels, channels, 3, 3, generator=generator)
    if kind == "gaussian":
        return gaussian
    u, _, vh = torch.linalg.svd(gaussian.flatten(1), full_matrices=False)
    falling: Tensor = (u * torch.arange(1, channels + 1) ** -0.5) @ vh
    return falling.reshape_as(gaussian)


def _spec(weight: Tensor) -> LayerSpec:
    return LayerSpec.of(
        torch.nn.Conv2d(weight.shape[1], weight.shape[0], 3, bias=False, device="meta")
    )


def fitted(method: str | Decomposer, rank: int | tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Our fit of a kernel by a method at a rank, multiplied back."""
    decomposer = get_decomposer(method)
    return lambda weight: factorize(decomposer, weight, _spec(weight), rank).to_kernel()


def vbmf_ranks(weight: Tensor) -> tuple[int, ...]:
    """Both ranks of Tucker-2, by our spectra."""
    spectra = spectra_of(get_decomposer("tucker2"), weight, _spec(weight))
    assert spectra is not None
    return tuple(evb_rank(s.squares[0], s.shape).rank for s in spectra)


def vbmf_by_full_svd(weight: Tensor) -> tuple[int, ...]:
    """Both ranks of Tucker-2, by the full SVDs of the usual EVBMF code."""
    ranks = []
    for mode in (1, 0):
        matrix = weight.movedim(mode, 0).flatten(1).numpy()
        _, values, _ = np.linalg.svd(matrix, full_matrices=True)
        shape = (matrix.shape[0], matrix.shape[1])
        ranks.append(evb_rank(values.astype(float) ** 2, shape).rank)
    return tuple(ranks)


def plain_parafac(rank: int, *, joined: bool) -> Callable[[Tensor], Tensor]:
    """TensorLy's fit, multiplied back, with the spatial modes joined into one or not."""

    def fit(weight: Tensor) -> Tensor:
        tensor = weight.flatten(2) if joined else weight
        with quiet_tensorly():
            found: Tensor = tensorly.cp_to_tensor(parafac(tensor, rank, init="svd"))
        return found.reshape(weight.shape)

    return fit


def plain_tucker2(weight: Tensor, ranks: tuple[int, int]) -> Tensor:
    """TensorLy's, at the ranks (in, out), multiplied back."""
    with quiet_tensorly():
        (core, factors), _ = partial_tucker(
            weight, rank=list(ranks[::-1]), modes=[0, 1], init="svd"
        )
        found: Tensor = tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
    return found


def _separable(channels: int, rank: int) -> Case:
    quick = CPSeparable(effort="quick")
    ways = {
        "": Way(fitted("cp-separable", rank), 10, 1.01),
        ", quick": Way(fitted(quick, rank), 20, 1.03),
    }
    plain = plain_parafac(rank, joined=False)
    return Case(f"cp-separable, {channels} at {rank}", channels, ways, plain)


def _joint(channels: int, rank: int) -> Case:
    ways = {"": Way(fitted("cp", rank), 5, 1.01)}
    return Case(f"cp, {channels} at {rank}", channels, ways, plain_parafac(rank, joined=True))


CASES = (
    Case("VBMF ranks, 512", 512, {"": Way(vbmf_ranks, 50)}, vbmf_by_full_svd),
    Case(
        "tucker2, 512 at (170, 170)",
        512,
        {"": Way(fitted("tucker2", (170, 170)), 3, 1.001)},
        partial(plain_tucker2, ranks=(170, 170)),
    ),
    _separable(256, 85),
    _joint(256, 85),
    _separable(512, 170),
    _joint(512, 170),
)


def rows(
    only: str, repeats: int, cases: Sequence[Case] = CASES, kernels: Sequence[str] = KERNELS
) -> Iterator[list[str]]:
    """One line per problem, way and kind of kernel, for the problems with `only` in their title."""
    for case in cases:
        for kind in kernels if only in case.title else ():
            yield from _measured(case, kind, repeats)


def _measured(case: Case, kind: str, repeats: int) -> Iterator[list[str]]:
    weight = kernel(case.channels, kind)
    ways = {name: partial(way.find, weight) for name, way in case.ours.items()}
    for name, sides in in_turns(ways, partial(case.plain, weight), repeats).items():
        way, title = case.ours[name], case.title + name
        if isinstance(sides.found, tuple):
            told = (str(sides.found), str(sides.found_plainly))
            yield row(title, kind, sides, at_least=way.times_faster, found=told)
            continue
        errors = (
            relative_error(weight, sides.found),
            relative_error(weight, sides.found_plainly),
        )
        yield row(title, kind, sides, at_least=way.times_faster, errors=errors, worse=way.worse)
