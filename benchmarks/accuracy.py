"""How much accuracy is left at a share of the MACs, without any labels, and what that costs.

One budget for the whole network (`tdecomp.Budget`), fitted to unlabelled training images, then
refitted, or reconstructed and then distilled, once for each seed, which draws the images. Accuracy
is that on all validation images, MACs are the whole network's by torch's counter, and times are in
plain forward passes over the same images, timed beside each step.

    python -m benchmarks.accuracy --data FOLDER --weights resnet20=FILE vgg11_bn=FILE

A line quickly: --budgets 0.3 --methods auto --seeds 0 --steps 0.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import tdecomp
from benchmarks.support.costs import count_macs
from benchmarks.support.data import Dataset, image_folder
from benchmarks.support.machine import describe_machine, describe_versions
from benchmarks.support.models import input_format, load_model
from benchmarks.support.output_error import lost_share
from tdecomp.calibration.fit_cache import FitCache

BATCH_SIZE = 128
FITTED, REFITTED, DISTILLED = "fitted", "refitted", "distilled"
RECONSTRUCTED = "reconstructed"  # what was fitted, without refitting it; then it is distilled
UNTRAINED = FITTED, REFITTED, RECONSTRUCTED
CALIBRATE_AND_PLAN, APPLY = "calibrate + plan", "apply"
# For a ResNet-20.
PASSES_BOUNDS = {CALIBRATE_AND_PLAN: 10, REFITTED: 8, RECONSTRUCTED: 20, DISTILLED: 60}


@dataclass(frozen=True)
class Case:
    """A line of the tables, with the points that may be lost."""

    network: str
    methods: str
    macs: float
    without_training: float | None = None
    with_distill: float | None = None


CASES = (
    Case("resnet20", "auto", 0.75),
    Case("resnet20", "auto", 0.50, 0.3, 0.15),
    Case("resnet20", "auto", 0.30, 1.0, 0.6),
    Case("resnet20", "auto", 0.20, 3.0, 2.0),
    Case("resnet20", "dense", 0.50, 0.7, 0.4),
    Case("resnet20", "dense", 0.30, 4.0, 2.5),
    Case("vgg11_bn", "auto", 0.25),
    Case("vgg11_bn", "auto", 0.10, 0.7, 0.5),
    Case("vgg11_bn", "auto", 0.05, 2.0, 1.5),
)


@dataclass(frozen=True)
class Result:
    """One line with one seed."""

    case: Case
    macs: float  # the share that is left
    drops: dict[str, float]  # percentage points lost, by stage
    passes: dict[str, float]  # what each step took
    errors: dict[str, tuple[float, float]]  # of the outputs, as reported and on all of `val`
    layers: str


class Network:
    """A trained network with its unlabelled images and what it gets right."""

    def __init__(self, name: str, weights: str, data: Dataset) -> None:
        self.model = load_model(name, weights)
        self.data = data
        self.batches: list[Tensor] = [x for x, _ in data.train.in_order(BATCH_SIZE)]
        self.example = self.batches[0][:1]
        self.macs = count_macs(self.model, self.example)
        self.outputs = self._outputs(self.model)
        self.accuracy = self._right(self.outputs)

    def judged(self, model: nn.Module) -> tuple[float, float]:
        """Percentage points lost, and the lost share of the outputs' variance, on all of `val`."""
        outputs = self._outputs(model)
        return 100.0 * (self.accuracy - self._right(outputs)), lost_share(self.outputs, outputs)

    @torch.inference_mode()
    def _outputs(self, model: nn.Module) -> Tensor:
        return torch.cat([model(x) for x, _ in self.data.val.in_order(BATCH_SIZE)]).double()

    def _right(self, outputs: Tensor) -> float:
        return float((outputs.argmax(dim=1) == self.data.val.labels).double().mean())

    def timed(self, step: Callable[[], Any]) -> tuple[Any, float]:
        """The result of a step, and how long it took in plain forward passes beside it."""
        passes = [self._forward_pass()]
        start = time.perf_counter()
        result = step()
        seconds = time.perf_counter() - start
        passes.append(self._forward_pass())
        return result, seconds / fmean(passes)

    @torch.inference_mode()
    def _forward_pass(self) -> float:
        start = time.perf_counter()
        for batch in self.batches:
            self.model(batch)
        return time.perf_counter() - start


def measure(network: Network, cases: Sequence[Case], *, steps: int | None) -> Iterator[Result]:
    """Calibrate once, and take every case through plan, apply and the recoveries."""
    model, batches = network.model, network.batches
    quiet: dict[str, Any] = {"progress": False}
    moments, calibrating = network.timed(
        lambda: tdecomp.calibrate(model, batches, augment=tdecomp.flip_and_shift, **quiet)
    )
    for case in cases:
        moments.fits = FitCache()  # each line pays for its own plan
        budget: dict[str, Any] = {
            "rank": tdecomp.Budget(macs=case.macs),
            "example_inputs": network.example,
        }
        data: dict[str, Any] = {"data": moments, **quiet}
        passes: dict[str, float] = {}
        drops: dict[str, float] = {}
        errors: dict[str, tuple[float, float]] = {}
        plan, planning = network.timed(partial(tdecomp.plan, model, case.methods, **budget, **data))
        passes[CALIBRATE_AND_PLAN] = calibrating + planning
        result, passes[APPLY] = network.timed(partial(tdecomp.apply, model, plan, **data))
        models = {FITTED: result.model}
        drops[FITTED], _ = network.judged(result.model)
        recoveries: list[tuple[str, str, Callable[..., Any]]] = [
            (FITTED, REFITTED, tdecomp.refit),
            (FITTED, RECONSTRUCTED, tdecomp.reconstruct),
        ]
        if steps != 0:
            distill = partial(tdecomp.distill, steps=steps)
            recoveries.append((RECONSTRUCTED, DISTILLED, distill))
        for start, stage, recover in recoveries:
            recovery, passes[stage] = network.timed(
                partial(recover, models[start], model, batches, **quiet)
            )
            models[stage] = recovery.model
            drops[stage], error = network.judged(recovery.model)
            errors[stage] = recovery.error_after, error
        counts = Counter(row.method or "whole" for row in plan)
        layers = ", ".join(f"{n} {method}" for method, n in sorted(counts.items()))
        left = count_macs(models[FITTED], network.example) / network.macs
        yield Result(case, left, drops, passes, errors, layers)


def points_table(results: Sequence[Result]) -> str:
    """The points lost on each line, over the seeds, beside what may be lost."""
    rows = []
    for case, several in _by_case(results).items():
        drops = {s: [result.drops[s] for result in several] for s in several[0].drops}
        rows.append(
            [
                *_labels(case),
                f"{fmean(result.macs for result in several):.3f}",
                *(mean_and_spread(drops[stage], "+.2f") for stage in UNTRAINED),
                _bound(case.without_training),
                mean_and_spread(drops.get(DISTILLED, ()), "+.2f"),
                _bound(case.with_distill),
                several[0].layers,
            ]
        )
    headers = [
        "network", "methods", "MACs\nasked", "MACs\nleft", *UNTRAINED, "bound",
        DISTILLED, "bound", "layers",
    ]  # fmt: skip
    return tabulate(rows, headers=headers, disable_numparse=True)


def work_table(results: Sequence[Result]) -> str:
    """What each step took in plain passes, and how its reported error compares with the truth."""
    stages = [stage for stage in results[0].passes if stage != FITTED]
    recovered = list(results[0].errors)
    rows = []
    for case, several in _by_case(results).items():
        passes = (mean_and_spread([r.passes[stage] for r in several], ".1f") for stage in stages)
        errors = (_reported([r.errors[stage] for r in several]) for stage in recovered)
        rows.append([*_labels(case), *passes, *errors])
    bounds = [str(PASSES_BOUNDS.get(stage, "")) for stage in stages]
    rows.append(["bound for resnet20", "", "", *bounds, *[""] * len(recovered)])
    headers = ["network", "methods", "MACs", *stages]
    headers += [f"error, {stage}:\nreported / on val" for stage in recovered]
    return tabulate(rows, headers=headers, disable_numparse=True)


def mean_and_spread(values: Sequence[float], style: str) -> str:
    """The mean, with the standard deviation where there are several."""
    if not values:
        return ""
    spread = f" ± {stdev(values):{style.lstrip('+')}}" if len(values) > 1 else ""
    return f"{fmean(values):{style}}{spread}"


def _by_case(results: Sequence[Result]) -> dict[Case, list[Result]]:
    cases = dict.fromkeys(result.case for result in results)
    return {case: [result for result in results if result.case == case] for case in cases}


def _labels(case: Case) -> list[str]:
    return [case.network, case.methods, f"{case.macs:.2f}"]


def _bound(points: float | None) -> str:
    return "" if points is None else f"{points:g}"


def _reported(errors: Sequence[tuple[float, float]]) -> str:
    reported, true = (fmean(column) for column in zip(*errors, strict=True))
    return f"{reported:.4f} / {true:.4f} = {reported / true:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m benchmarks.accuracy` with these command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER", help="FOLDER/train and FOLDER/val"
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        required=True,
        metavar="NETWORK=FILE",
        help="trained weights of resnet20, vgg11_bn or both; only these are measured",
    )
    parser.add_argument(
        "--budgets", nargs="+", type=float, metavar="SHARE", help="only lines with these budgets"
    )
    parser.add_argument("--methods", choices=("auto", "dense"), help="only lines with these")
    parser.add_argument("--images", type=int, default=1024, help="unlabelled (default: 1024)")
    parser.add_argument(
        "--steps", type=int, help="of the distillation (default: its own); 0 leaves it out"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=(0, 1, 2), help="draw the images (default: 0 1 2)"
    )
    options = parser.parse_args(arguments)
    results: list[Result] = []
    for entry in options.weights:
        name, _, file = entry.partition("=")
        cases = [
            case
            for case in CASES
            if case.network == name
            and (not options.budgets or case.macs in options.budgets)
            and options.methods in (None, case.methods)
        ]
        if not cases:
            parser.error(f"no line of the table is about {entry!r}; expected NETWORK=FILE")
        for seed in options.seeds:
            try:
                data = image_folder(
                    options.data, input_format(name), train_images=options.images, seed=seed
                )
                network = Network(name, file, data)
            except ValueError as error:
                parser.error(str(error))
            print(
                f"{name} on {data.title}, seed {seed}: {network.accuracy:.2%} of "
                f"{len(data.val)} images"
            )
            for result in measure(network, cases, steps=options.steps):
                results.append(result)
                print(points_table([result]), flush=True)
    machine, versions = describe_machine(), describe_versions()
    print(f"\n{points_table(results)}\n\n{work_table(results)}\n")
    print(
        f"* percentage points lost and passes: mean ± standard deviation over the seeds "
        f"{', '.join(map(str, options.seeds))}, each with {options.images} unlabelled images"
    )
    print(
        "* passes: plain forward passes of the original over these images; errors: shares of the "
        "outputs' variance"
    )
    print(f"* {machine['torch_threads']} threads of {machine['cpu']}; {versions}")


if __name__ == "__main__":
    main()
