"""How long fits to data take on wide layers, and in how much memory, beside a plain loop.

The plain loop goes through the convolutions: float32 moments of the patches, the eigenvectors of
the smaller Gram matrix, whitening, a thin SVD, and the two factors at half the MACs. Each network
has a process of its own, whose memory is counted from when the model has run once.

    python -m benchmarks.fit_speed
    python -m benchmarks.fit_speed --only pitch --threads 1
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import tdecomp
from benchmarks.support.machine import describe_machine, describe_versions, peak_memory
from benchmarks.support.wide_networks import (
    pitch_network,
    resnet18,
    smooth_images,
    sounds,
    text_detector,
    vgg16,
)
from tdecomp.layers.patches import patches
from tdecomp.layers.spec import LayerSpec

_STEPS = ("calibrate", "plan", "apply", "refit")


@dataclass(frozen=True)
class Case:
    """A network, its unlabelled batches, what decomposes it, and what it must reach."""

    title: str
    build: Callable[[], nn.Module]
    batches: Callable[[], list[Tensor]]
    methods: str
    refit: bool
    bound: str


CASES = (
    Case("VGG-16-BN, 16 images", vgg16, partial(smooth_images, 16, 256, at_a_time=4), "dense",
         refit=False, bound="3 plain loops, apply a quarter of plan"),
    Case("ResNet-18, 64 images", resnet18, partial(smooth_images, 64, 224, at_a_time=16), "dense",
         refit=True, bound="none"),
    Case("pitch network, 800 frames", pitch_network, partial(sounds, 800), "auto",
         refit=True, bound="30 s, 0.6 GB"),
    Case("text detector, 8 images", text_detector, partial(smooth_images, 8, 256, at_a_time=1),
         "dense", refit=True, bound="60 s after calibrate, 1.5 GB"),
)  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """Seconds of each step and of the plain loop, bytes over the start, and what is lost."""

    seconds: dict[str, float]
    plain: float
    peak: int
    loss: float  # the sum of the layers' losses over that of all outputs, from the plan


def measure(case: Case, threads: int) -> Figures:
    """Take every step once, and the plain loop after them."""
    torch.set_num_threads(threads)
    model, batches = case.build(), case.batches()
    with torch.inference_mode():
        model(batches[0])
    start = _memory_now()
    seconds: dict[str, float] = {}

    def timed(step: str, run: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = run()
        seconds[step] = time.perf_counter() - began
        return result

    moments = timed("calibrate", lambda: tdecomp.calibrate(model, batches, progress=False))
    plan = timed("plan", lambda: tdecomp.plan(
        model, case.methods, rank=tdecomp.Budget(macs=0.5), example_inputs=batches[0][:1],
        data=moments, progress=False,
    ))  # fmt: skip
    result = timed("apply", lambda: tdecomp.apply(model, plan, data=moments, progress=False))
    if case.refit:
        timed("refit", lambda: tdecomp.refit(result.model, model, batches, progress=False))
    peak = peak_memory() - start
    timed("plain", lambda: plain_loop(model, batches))
    errors = [row.output_error for row in result.report if row.output_error is not None]
    return Figures(seconds, seconds.pop("plain"), peak, sum(errors) / max(len(errors), 1))


@torch.no_grad()
def plain_loop(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors (out, rank) and (rank, kernel · in) of each convolution at half its MACs."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            moment, rows = _gram_matrix(model, layer, batches)
            values, vectors = torch.linalg.eigh(moment)
            values = values.clamp_min(1e-6 * float(values[-1]))
            if rows is not None:  # the samples' Gram matrix has the same eigenvalues
                vectors = rows.T @ vectors / values.sqrt()
            kernel, root = layer.weight.movedim(1, -1).flatten(1), values.sqrt()
            u, s, vh = torch.linalg.svd((kernel @ vectors) * root, full_matrices=False)
            rank = max(1, kernel.numel() // (2 * sum(kernel.shape)))
            found[name] = u[:, :rank] * s[:rank], (vh[:rank] / root) @ vectors.T
    return found


def _gram_matrix(
    model: nn.Module, layer: nn.Conv2d, batches: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """That of the inputs; with fewer patches than inputs that of the patches, and these."""
    spec = LayerSpec.of(layer)
    moment: Tensor | None = None
    held: list[Tensor] = []

    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal moment
        for (rows,) in patches(inputs[0], spec):
            if moment is None and sum(map(len, (*held, rows))) < spec.fan_in:
                held.append(rows.clone())
                continue
            if moment is None:
                moment = torch.zeros(spec.fan_in, spec.fan_in)
            for some in (*held, rows):
                moment.addmm_(some.T, some)
            held.clear()

    handle = layer.register_forward_pre_hook(add)
    for batch in batches:
        model(batch)
    handle.remove()
    if moment is not None:
        return moment, None
    rows = torch.cat(held)
    return rows @ rows.T, rows


def _memory_now() -> int:
    """The bytes that the process holds."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * 4096 if pages.exists() else peak_memory()


def line(case: Case, figures: Figures) -> list[str]:
    """The cells of one case."""
    ratio = sum(figures.seconds.values()) / figures.plain
    steps = [f"{figures.seconds[s]:.1f}" if s in figures.seconds else "" for s in _STEPS]
    return [
        case.title, case.methods, *steps, f"{sum(figures.seconds.values()):.1f}",
        f"{figures.plain:.1f}", f"{ratio:.2f}", f"{figures.peak / 1e9:.2f}",
        f"{figures.loss:.4f}", case.bound,
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None, cases: Sequence[Case] = CASES) -> None:
    """Run `python -m benchmarks.fit_speed` with these command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fit_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", help="cases whose title holds this")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    headers = ("network", "methods", *(f"{step}, s" for step in _STEPS), "all, s", "plain, s",
               "ratio", "GB", "mean error", "bound")  # fmt: skip
    rows = []
    for case in cases:
        if options.only in case.title:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                figures = pool.submit(measure, case, options.threads).result()
            rows.append(line(case, figures))
            print(tabulate(rows[-1:], headers, disable_numparse=True), flush=True)
    machine, versions = describe_machine(), describe_versions()
    print(f"\n{tabulate(rows, headers, disable_numparse=True)}\n")
    print(f"* {options.threads} threads of {machine['cpu']}; {versions}")


if __name__ == "__main__":
    main()
