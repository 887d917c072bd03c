"""Measured time of whole networks under a budget in time, or a guarded budget in MACs.

Each result is timed against its original in interleaved rounds, in the same mode. torchvision's
networks have random weights here: the loss of a layer is the share of its squared weights, which
is enough to compare methods at the same time. Trained networks need ``--data`` and ``--weights``;
they are refitted and distilled with unlabelled images, and both originals and results run in their
best layout.

    python -m benchmarks.latency
    python -m benchmarks.latency --networks --data FOLDER --weights vgg11_bn=FILE resnet20=FILE
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import tdecomp
from benchmarks.accuracy import Network
from benchmarks.support.data import image_folder
from benchmarks.support.machine import describe_machine, describe_versions
from benchmarks.support.models import input_format
from benchmarks.support.torchvision_import import import_torchvision
from tdecomp.model.example import Example
from tdecomp.timing.whole_model import compare

NETWORKS = (("resnet18", 1), ("resnet50", 1), ("resnet50", 8), ("vgg16", 1))
MODES = ("eager", "compiled")
BATCH_SIZE = 64
HEADERS = ["network", "batch", "mode", "asked for", "measured time (quartiles)", "at most", "told"]


@dataclass(frozen=True)
class Trained:
    """A line about a trained network."""

    network: str
    budget: tdecomp.Budget
    bound: float
    points: float | None
    only_if_faster: bool = False


TRAINED = (
    Trained("vgg11_bn", tdecomp.Budget(latency=0.3), 0.31, 1.0),
    Trained("vgg11_bn", tdecomp.Budget(latency=0.2), 0.21, 2.0),
    Trained("resnet20", tdecomp.Budget(macs=0.5), 1.0, None, only_if_faster=True),
)


def untrained(name: str, batch: int, mode: str) -> Iterator[list[str]]:
    """One row for each kind of budget."""
    torch.manual_seed(0)
    model: nn.Module = getattr(import_torchvision().models, name)(weights=None).eval()
    x = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    profile = tdecomp.profile(
        model, x, memory_format="channels_last", compiled=mode == "compiled", progress=False
    )
    seconds = time.perf_counter() - start
    yield [name, str(batch), mode, "profile", f"{seconds:.1f} s", "60 s", profile.summary()]
    common: dict[str, Any] = {"example_inputs": x, "profile": profile, "progress": False}
    budget = tdecomp.Budget(latency=0.5)
    dense = tdecomp.decompose(model, "dense", rank=budget, **common)
    alone = tdecomp.decompose(model, ["lowrank", "svd"], rank=budget, **common)
    losses = [_lost(result.report) for result in (dense, alone)]
    times = [_measured(model, result, x) for result in (dense, alone)]
    told = f"loses {losses[0]:.2f} where lowrank alone at {times[1].median:.3f} "
    told += f"loses {losses[1]:.2f}"
    yield _row(name, batch, mode, "latency=0.5", times[0], 0.53, told)
    guarded = tdecomp.decompose(
        model, "dense", rank=tdecomp.Budget(macs=0.5), only_if_faster=True, **common
    )
    rows = [row for row in guarded.report if row.method is not None]
    slowest = max((r.latency_after or 0.0) / (r.latency_before or 1.0) for r in rows)
    kept = (guarded.report.after.macs or 0) / (guarded.report.before.macs or 1)
    told = f"MACs {kept:.3f}; slowest chain {slowest:.2f} of its layer"
    asked = "macs=0.5, only_if_faster"
    yield _row(name, batch, mode, asked, _measured(model, guarded, x), 0.62, told)


def _lost(report: tdecomp.Report) -> float:
    """The sum over layers of the share of their squared weights."""
    return sum((row.weight_error or 0.0) ** 2 for row in report)


def _measured(model: nn.Module, result: tdecomp.Decomposition, x: Tensor) -> Any:
    """Once more, apart from what the report says."""
    speed = result.report.speed
    assert speed is not None
    layouts = (speed.tried, speed.tried)
    return compare(model, result.model, Example(x), layouts, compiled=speed.compiled).measured


def _row(
    name: str, batch: int, mode: str, asked: str, measured: Any, bound: float, told: str
) -> list[str]:
    shown = f"{measured.median:.3f} ({measured.low:.3f} to {measured.high:.3f})"
    return [name, str(batch), mode, asked, shown, f"{bound:.2f}", told]


def trained(case: Trained, network: Network, batch: Tensor) -> list[str]:
    """The row of one trained network: its time, and what it still gets right."""
    profile = tdecomp.profile(network.model, batch, "auto", memory_format="auto", progress=False)
    result = tdecomp.decompose(
        network.model,
        "auto",
        rank=case.budget,
        example_inputs=batch,
        data=network.batches,
        recover=["refit", "distill"],
        profile=profile,
        only_if_faster=case.only_if_faster,
        progress=False,
    )
    speed = result.report.speed
    assert speed is not None
    measured = _measured(network.model, result, batch)
    changed = sum(row.method is not None for row in result.report)
    told = (
        f"drop {network.judged(result.model)[0]:+.2f} points"
        + ("" if case.points is None else f" (at most {case.points:g})")
        + f"; {changed} layers decomposed; {speed.layout_before} before, {speed.layout} after"
    )
    asked = f"latency={case.budget.latency}" if case.budget.latency else "macs=0.5, only_if_faster"
    return _row(case.network, len(batch), "eager", asked, measured, case.bound, told)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m benchmarks.latency` with these command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [f"{name}:{batch}" for name, batch in NETWORKS]
    parser.add_argument("--networks", nargs="*", choices=names, default=names, help="(all)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="(both)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="FOLDER/train and FOLDER/val")
    parser.add_argument("--weights", nargs="+", default=[], metavar="NETWORK=FILE")
    parser.add_argument("--images", type=int, default=1024, help="unlabelled (default: 1024)")
    options = parser.parse_args(arguments)
    rows: list[list[str]] = []

    def show(row: list[str]) -> None:
        rows.append(row)
        print("  ".join(row), flush=True)

    for mode in options.modes:
        for label in options.networks:
            name, _, batch = label.partition(":")
            try:
                for row in untrained(name, int(batch), mode):
                    show(row)
            except ValueError as error:  # too noisy, say: the other lines still stand
                show([name, batch, mode, "", "", "", str(error)])
    for entry in options.weights:
        name, _, file = entry.partition("=")
        if options.data is None:
            parser.error("--weights: trained networks are judged on images; expected --data FOLDER")
        try:
            data = image_folder(options.data, input_format(name), train_images=options.images)
            network = Network(name, file, data)
        except ValueError as error:
            parser.error(str(error))
        images = torch.cat(network.batches)[:BATCH_SIZE]
        for case in TRAINED:
            if case.network == name:
                show(trained(case, network, images))
    print("\n" + tabulate(rows, HEADERS, disable_numparse=True))
    print(", ".join(f"{k} {v}" for k, v in (describe_machine() | describe_versions()).items()))


if __name__ == "__main__":
    main()
