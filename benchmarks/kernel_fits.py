"""Ranks and fits of single kernels, against the same made plainly with NumPy and TensorLy.

Each pair is timed one after the other, ours first and theirs first by turns, and judged by the same
relative error. Kernels are Gaussian, which is the slow case for all (nothing stands out), or have a
spectrum that falls as those of trained layers do.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import tensorly
import torch
from tabulate import tabulate
from tensorly.decomposition import parafac, partial_tucker
from torch import Tensor

from benchmarks.machine import describe_machine, describe_versions
from tdecomp.decomposers.base import get_decomposer, relative_error
from tdecomp.layer import LayerSpec
from tdecomp.ranks.evb import evb_rank

KERNELS = ("gaussian", "falling")


@dataclass(frozen=True)
class Fit:
    """What was found, a kernel or ranks, and how long it took."""

    seconds: float
    found: Tensor | tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One line: a problem, and the two ways to solve it."""

    title: str
    channels: int
    ours: Callable[[Tensor], Tensor | tuple[int, ...]]
    theirs: Callable[[Tensor], Tensor | tuple[int, ...]]


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


def _fitted(method: str, rank: int | tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    decomposer = get_decomposer(method)
    return lambda weight: decomposer.factorize(weight, _spec(weight), rank).to_kernel()


def _vbmf(weight: Tensor) -> tuple[int, ...]:
    spectra = get_decomposer("tucker2").spectra(weight, _spec(weight))
    assert spectra is not None
    return tuple(evb_rank(s.squares[0], s.shape).rank for s in spectra)


def _vbmf_by_full_svd(weight: Tensor) -> tuple[int, ...]:
    ranks = []
    for mode in (1, 0):
        matrix = weight.movedim(mode, 0).flatten(1).numpy()
        _, values, _ = np.linalg.svd(matrix, full_matrices=True)
        shape = (matrix.shape[0], matrix.shape[1])
        ranks.append(evb_rank(values.astype(float) ** 2, shape).rank)
    return tuple(ranks)


def _parafac(rank: int, *, joined: bool) -> Callable[[Tensor], Tensor]:
    def fit(weight: Tensor) -> Tensor:
        tensor = weight.flatten(2) if joined else weight
        with tensorly.backend_context("pytorch"), warnings.catch_warnings():
            # Of ranks above the three that a spatial mode has.
            warnings.filterwarnings("ignore", message="Trying to compute SVD with n_eigenvecs")
            found: Tensor = tensorly.cp_to_tensor(parafac(tensor, rank, init="svd"))
        return found.reshape(weight.shape)

    return fit


def _partial_tucker(ranks: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    def fit(weight: Tensor) -> Tensor:
        with tensorly.backend_context("pytorch"):
            (core, factors), _ = partial_tucker(weight, rank=list(ranks), modes=[0, 1], init="svd")
            found: Tensor = tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
        return found

    return fit


CASES = (
    Case("VBMF ranks, 512", 512, _vbmf, _vbmf_by_full_svd),
    Case("tucker2, 512 at (170, 170)", 512, _fitted("tucker2", (170, 170)),
         _partial_tucker((170, 170))),
    Case("cp-separable, 256 at 85", 256, _fitted("cp-separable", 85), _parafac(85, joined=False)),
    Case("cp, 256 at 85", 256, _fitted("cp", 85), _parafac(85, joined=True)),
    Case("cp-separable, 512 at 170", 512, _fitted("cp-separable", 170),
         _parafac(170, joined=False)),
    Case("cp, 512 at 170", 512, _fitted("cp", 170), _parafac(170, joined=True)),
)  # fmt: skip


def _timed(find: Callable[[Tensor], Tensor | tuple[int, ...]], weight: Tensor) -> Fit:
    start = time.perf_counter()
    found = find(weight)
    return Fit(time.perf_counter() - start, found)


def measure(case: Case, kind: str, repeats: int) -> list[str]:
    """One row: times, their ratio, and what came out of both."""
    weight = kernel(case.channels, kind)
    pairs = []
    for i in range(repeats):
        order = (case.ours, case.theirs) if i % 2 == 0 else (case.theirs, case.ours)
        fits = [_timed(find, weight) for find in order]
        pairs.append(fits if i % 2 == 0 else fits[::-1])
    ours, theirs = pairs[0]
    ratio = float(np.median([b.seconds / a.seconds for a, b in pairs]))
    return [
        case.title,
        kind,
        *(f"{np.median([fit.seconds for fit in side]):.2f}" for side in zip(*pairs, strict=True)),
        f"{ratio:.1f}",
        _told(ours.found, weight),
        _told(theirs.found, weight),
    ]


def _told(found: Tensor | tuple[int, ...], weight: Tensor) -> str:
    if isinstance(found, tuple):
        return str(found)
    return f"{relative_error(weight, found):.4f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one row per problem and kind of kernel."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_fits", description=__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="pairs of each problem (3)")
    parser.add_argument("--only", default="", help="problems whose title holds this")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    options = parser.parse_args(arguments)
    headers = ["512×512×3×3 and less", "kernel", "s", "s, plain", "times faster", "found", "plain"]
    rows = []
    for case in CASES:
        for kind in options.kernels:
            if options.only in case.title:
                rows.append(measure(case, kind, options.repeat))
                print(tabulate(rows[-1:], headers, disable_numparse=True), flush=True)
    print("\n" + tabulate(rows, headers, disable_numparse=True))
    print(", ".join(f"{k} {v}" for k, v in (describe_machine() | describe_versions()).items()))


if __name__ == "__main__":
    main()
