"""How much accuracy is left at a share of the MACs, without any labels.

One budget for the whole network (`tdecomp.Budget`), fitted to unlabelled training images, then
refitted, then distilled. Accuracy is that on all validation images, MACs are the whole network's
by torch's counter, and times are in units of one plain forward pass over the same images, timed
beside each step.

    python -m benchmarks.accuracy --data FOLDER --weights resnet20=FILE vgg11_bn=FILE
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import tdecomp
from benchmarks.support.comparison import count_macs
from benchmarks.support.data import Dataset, image_folder
from benchmarks.support.machine import describe_machine, describe_versions
from benchmarks.support.models import input_format, load_model
from benchmarks.support.training import accuracy
from tdecomp.calibration.moments import FitCache

BATCH_SIZE = 128


@dataclass(frozen=True)
class Case:
    """A line of the table."""

    network: str
    methods: str
    macs: float


CASES = (
    Case("resnet20", "auto", 0.75),
    Case("resnet20", "auto", 0.50),
    Case("resnet20", "auto", 0.30),
    Case("resnet20", "auto", 0.20),
    Case("resnet20", "dense", 0.50),
    Case("vgg11_bn", "auto", 0.25),
    Case("vgg11_bn", "auto", 0.10),
    Case("vgg11_bn", "auto", 0.05),
)


@dataclass(frozen=True)
class Result:
    """Drops in percentage points, times in forward passes over the unlabelled images."""

    case: Case
    macs: float
    drops: tuple[float, ...]
    units: tuple[float, ...]
    methods: str


class Network:
    """A trained network with its unlabelled images and what it gets right."""

    def __init__(self, name: str, weights: str, data: Dataset) -> None:
        self.model = load_model(name, weights)
        self.data = data
        self.batches: list[Tensor] = [x for x, _ in data.train.in_order(BATCH_SIZE)]
        self.example = self.batches[0][:1]
        self.macs = count_macs(self.model, self.example)
        self.accuracy = accuracy(self.model, data.val)

    def drop(self, model: nn.Module) -> float:
        """Percentage points lost."""
        return 100.0 * (self.accuracy - accuracy(model, self.data.val))

    def timed(self, step: Callable[[], Any]) -> tuple[Any, float]:
        """The result of a step, and how long it took in plain forward passes beside it."""
        passes = [self._forward_pass()]
        start = time.perf_counter()
        result = step()
        seconds = time.perf_counter() - start
        passes.append(self._forward_pass())
        return result, seconds / (sum(passes) / len(passes))

    @torch.inference_mode()
    def _forward_pass(self) -> float:
        start = time.perf_counter()
        for batch in self.batches:
            self.model(batch)
        return time.perf_counter() - start


def measure(network: Network, cases: Sequence[Case], *, steps: int | None) -> Iterator[Result]:
    """Calibrate once, and take every case through plan, apply, refit and distill."""
    moments, calibrating = network.timed(
        lambda: tdecomp.calibrate(
            network.model, network.batches, augment=tdecomp.flip_and_shift, progress=False
        )
    )
    for case in cases:
        moments.fits = FitCache()  # each line pays for its own plan
        plan, planning = network.timed(
            lambda case=case: tdecomp.plan(  # type: ignore[misc]
                network.model,
                case.methods,
                rank=tdecomp.Budget(macs=case.macs),
                example_inputs=network.example,
                data=moments,
                progress=False,
            )
        )
        result, applying = network.timed(
            lambda plan=plan: tdecomp.apply(  # type: ignore[misc]
                network.model, plan, data=moments, progress=False
            )
        )
        refitted, refitting = network.timed(
            lambda model=result.model: tdecomp.refit(  # type: ignore[misc]
                model, network.model, network.batches, progress=False
            )
        )
        models = [result.model, refitted.model]
        units = [calibrating + planning, applying, refitting]
        if steps != 0:
            distilled, distilling = network.timed(
                lambda model=refitted.model: tdecomp.distill(  # type: ignore[misc]
                    model, network.model, network.batches, steps=steps, progress=False
                )
            )
            models.append(distilled.model)
            units.append(distilling)
        counts: dict[str, int] = {}
        for row in plan:
            label = row.method or "whole"
            counts[label] = counts.get(label, 0) + 1
        yield Result(
            case,
            count_macs(models[-1], network.example) / network.macs,
            tuple(network.drop(model) for model in models),
            tuple(units),
            ", ".join(f"{n} {method}" for method, n in sorted(counts.items())),
        )


def table(results: Sequence[Result]) -> str:
    """The results as text."""
    steps = ("fitted", "refitted", "distilled")
    stages = ("calibrate\n+ plan", "apply", "refit", "distill")
    rows = [
        [
            result.case.network,
            result.case.methods,
            f"{result.case.macs:.2f}",
            f"{result.macs:.3f}",
            *(f"{drop:+.2f}" for drop in result.drops),
            *(f"{unit:.1f}" for unit in result.units),
            result.methods,
        ]
        for result in results
    ]
    headers = [
        "network",
        "methods",
        "budget\n(MACs)",
        "MACs\nkept",
        *(f"drop,\n{step}" for step in steps[: len(results[0].drops)]),
        *(f"units,\n{stage}" for stage in stages[: len(results[0].units)]),
        "layers",
    ]
    return tabulate(rows, headers=headers, disable_numparse=True)


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
    parser.add_argument("--images", type=int, default=1024, help="unlabelled (default: 1024)")
    parser.add_argument(
        "--steps", type=int, help="of the distillation (default: its own); 0 leaves it out"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the unlabelled images")
    options = parser.parse_args(arguments)
    results: list[Result] = []
    for entry in options.weights:
        name, _, file = entry.partition("=")
        cases = [
            case
            for case in CASES
            if case.network == name and (not options.budgets or case.macs in options.budgets)
        ]
        if not cases:
            parser.error(f"no line of the table is about {entry!r}; expected NETWORK=FILE")
        try:
            data = image_folder(
                options.data, input_format(name), train_images=options.images, seed=options.seed
            )
            network = Network(name, file, data)
        except ValueError as error:
            parser.error(str(error))
        print(f"{name} on {data.title}: {network.accuracy:.2%} of {len(data.val)} images")
        for result in measure(network, cases, steps=options.steps):
            results.append(result)
            print(table([result]), flush=True)
    machine, versions = describe_machine(), describe_versions()
    print(f"\n{table(results)}\n")
    print(
        f"* drop: percentage points; {options.images} unlabelled images; units: forward passes of "
        "the original over them"
    )
    print(f"* {machine['torch_threads']} threads of {machine['cpu']}; {versions}")


if __name__ == "__main__":
    main()
