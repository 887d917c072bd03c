"""Composer's fit against the closed form: a 256→256 3×3 layer from 32 maps of 14×14.

The baseline is alternating least squares as Composer's documentation describes it: every patch
laid out as a row, a start from the SVD of the weights, then `ROUNDS` times each factor by
`torch.linalg.lstsq` with the other one held. Both are told nothing but the weights and the maps.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional

import tdecomp
from benchmarks.support.machine import describe_machine, describe_versions
from tdecomp.composer.core import LowRankSolution, factorize_conv2d

CHANNELS, SIZE, MAPS = 256, 14, 32
RANK = 64
ROUNDS = 3
REPEATS = 5


@dataclass(frozen=True)
class Fit:
    """Medians over the repeats; the ratio is of times taken one after the other."""

    seconds: float
    ratio: float
    nmse: float


def problem(
    channels: int = CHANNELS, size: int = SIZE, maps: int = MAPS, seed: int = 0
) -> tuple[nn.Conv2d, Tensor]:
    """A layer as torch initialises it, and maps as such a layer gets them.

    The maps are what a convolution, a batch norm and a ReLU make of smooth random images, so that
    channels and neighbouring pixels are correlated and nothing is negative.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        images = functional.avg_pool2d(torch.randn(maps, channels // 4, size + 2, size + 2), 3, 1)
        before = nn.Sequential(
            nn.Conv2d(channels // 4, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()
        )
        inputs: Tensor = before(images)
        return nn.Conv2d(channels, channels, 3, padding=1), inputs


@torch.no_grad()
def alternating_fit(conv: nn.Conv2d, maps: Tensor, rank: int, rounds: int = ROUNDS) -> Tensor:
    """The kernel (out, in, kh, kw) of rank `rank` by alternating least squares, without a bias."""
    patches = functional.unfold(maps, conv.kernel_size, padding=conv.padding)  # type: ignore[arg-type]
    rows = patches.transpose(1, 2).flatten(0, 1)  # (samples, fan_in)
    weights = conv.weight.flatten(1).T  # (fan_in, out)
    outputs = rows @ weights
    u, s, vh = torch.linalg.svd(weights, full_matrices=False)
    first, second = u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * vh[:rank]
    full = torch.linalg.lstsq(rows, outputs).solution  # (fan_in, out)
    for _ in range(rounds):
        second = torch.linalg.lstsq(rows @ first, outputs).solution
        # X A B = Y for A: of the unconstrained X⁺ Y, what B can give.
        first = torch.linalg.lstsq(second.T, full.T).solution.T
    kernel: Tensor = (first @ second).T.reshape_as(conv.weight)
    return kernel


@torch.no_grad()
def closed_form(conv: nn.Conv2d, maps: Tensor, rank: int) -> LowRankSolution:
    """The library's fit of the same layer."""
    assert conv.bias is not None
    return factorize_conv2d(maps, conv.weight, rank=rank, biasA=conv.bias, padding=conv.padding)


def decomposed(conv: nn.Conv2d, maps: Tensor, rank: int) -> nn.Module:
    """The chain of the library's own `lowrank`, with everything that goes on around its fit."""
    return tdecomp.decompose(conv, "lowrank", rank=rank, data=maps, progress=False).model


@torch.no_grad()
def measured_nmse(conv: nn.Conv2d, maps: Tensor, kernel: Tensor) -> float:
    """The error of a kernel with the best bias for it, by running it."""
    expected = conv(maps).double()
    error = expected - functional.conv2d(maps, kernel, padding=conv.padding).double()
    error -= error.mean(dim=(0, 2, 3), keepdim=True)
    return float(error.square().mean() / expected.var())


def compare(conv: nn.Conv2d, maps: Tensor, rank: int, repeats: int = REPEATS) -> dict[str, Fit]:
    """Time all in turn, the first one of each kind unmeasured, and judge them the same way."""
    fits: dict[str, Callable[[], Tensor]] = {
        "alternating": lambda: alternating_fit(conv, maps, rank),
        "closed form": lambda: _product(closed_form(conv, maps, rank)),
        "lowrank, data=": lambda: _kernel(decomposed(conv, maps, rank)),
    }
    kernels = {name: fit() for name, fit in fits.items()}
    seconds = np.array([[_seconds(fit) for fit in fits.values()] for _ in range(repeats)])
    ratios = np.median(seconds / seconds[:, :1], axis=0)
    medians = np.median(seconds, axis=0)
    return {
        name: Fit(float(medians[i]), float(ratios[i]), measured_nmse(conv, maps, kernel))
        for i, (name, kernel) in enumerate(kernels.items())
    }


def _seconds(fit: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    fit()
    return time.perf_counter() - start


def _product(solution: LowRankSolution) -> Tensor:
    assert solution.Wa is not None
    assert solution.Wb is not None
    return torch.einsum("or,rikl->oikl", solution.Wb.flatten(1), solution.Wa)


def _kernel(chain: nn.Module) -> Tensor:
    assert isinstance(chain, tdecomp.Chain)
    assert chain.replaced is not None
    factors = chain.decomposer.factors_in(chain)
    assert factors is not None
    kernel: Tensor = factors.to_kernel().float()
    return kernel


def main() -> None:
    """Print the table, and what it was measured on."""
    fits = compare(*problem(), RANK)
    rows = [
        [name, f"{fit.seconds:.3f}", f"{fit.ratio:.3f}", f"{fit.nmse:.4f}"]
        for name, fit in fits.items()
    ]
    print(f"{CHANNELS}→{CHANNELS} 3×3 at rank {RANK}, {MAPS} maps of {SIZE}×{SIZE}")
    print(tabulate(rows, ["fit", "seconds", "of the first", "nmse"], disable_numparse=True))
    print(", ".join(f"{k} {v}" for k, v in (describe_machine() | describe_versions()).items()))


if __name__ == "__main__":
    main()
