"""How long decomposing torchvision's VGG-16 takes, and how much memory.

Each task runs in a process of its own, so that its peak memory is its own. Random weights have no
rank to find, which is the easy case for VBMF with Tucker-2; "planted" adds a third of each kernel's
full rank to them.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import nn

import tdecomp
from benchmarks.machine import describe_machine, describe_versions
from benchmarks.torchvision_import import import_torchvision


@dataclass(frozen=True)
class Measured:
    """What one task took: seconds, and the whole process's peak memory in bytes."""

    seconds: float
    peak: int


def vbmf_ranks(model: nn.Module) -> None:
    """Tucker-2 ranks of every convolution by VBMF, nothing fitted."""
    tdecomp.plan(model, "tucker2", rank="vbmf")


def tucker2_by_vbmf(model: nn.Module) -> None:
    """Plan and fit."""
    tdecomp.decompose(model, "tucker2", rank="vbmf", progress=False)


def lowrank_quarter(model: nn.Module) -> None:
    """Every convolution at a quarter of its full rank."""
    tdecomp.decompose(model, "lowrank", rank=0.25, progress=False)


def calibrate(model: nn.Module) -> None:
    """What every layer sees of sixteen noise images at 224×224, eight at a time."""
    images = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    tdecomp.calibrate(model, images.split(8), progress=False)


TASKS: dict[str, Callable[[nn.Module], None]] = {
    "VBMF ranks of every convolution": vbmf_ranks,
    "tucker2, rank='vbmf'": tucker2_by_vbmf,
    "lowrank, rank=0.25": lowrank_quarter,
    "calibrate, 16 images": calibrate,
}
WEIGHTS = ("random", "planted")


def vgg16(weights: str) -> nn.Module:
    """VGG-16 with seeded random weights, a third of the full rank planted on top if asked for."""
    torch.manual_seed(0)
    model: nn.Module = import_torchvision().models.vgg16(weights=None)
    if weights == "planted":
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                _plant(module)
    return model


def _plant(conv: nn.Conv2d) -> None:
    matrix = conv.weight.detach().flatten(1)
    rank = max(1, min(matrix.shape) // 3)
    planted = torch.randn(matrix.shape[0], rank) @ torch.randn(rank, matrix.shape[1])
    with torch.no_grad():
        conv.weight.add_(2 * matrix.std() * planted.reshape(conv.weight.shape) / rank**0.5)


def measure(task: str, weights: str, threads: int) -> Measured:
    """Run one task on a new model; meant for a process of its own."""
    torch.set_num_threads(threads)
    model = vgg16(weights)
    start = time.perf_counter()
    TASKS[task](model)
    seconds = time.perf_counter() - start
    return Measured(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one row per task and kind of weights."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each task (3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    rows = []
    for weights in WEIGHTS:
        for task in TASKS:
            runs = [_in_own_process(task, weights, options.threads) for _ in range(options.repeat)]
            seconds = [run.seconds for run in runs]
            rows.append(
                [
                    task,
                    weights,
                    f"{statistics.median(seconds):.2f}",
                    f"{min(seconds):.2f}–{max(seconds):.2f}",
                    f"{max(run.peak for run in runs) / 1e9:.2f}",
                ]
            )
    headers = ["VGG-16", "weights", "median s", "range s", "peak GB"]
    print(tabulate(rows, headers=headers, disable_numparse=True))
    facts = {**describe_machine(), **describe_versions(), "torch_threads": options.threads}
    print("\n" + ", ".join(f"{name} {value}" for name, value in facts.items()))


def _in_own_process(task: str, weights: str, threads: int) -> Measured:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(measure, task, weights, threads).result()


if __name__ == "__main__":
    main()
