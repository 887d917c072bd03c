"""When does each method pay: measured time against MACs, over sizes of layers.

Single 3×3 convolutions with as many outputs as inputs, in channels_last, and their chains at
several ranks, timed in the same rounds. On the dashed line time falls as fast as MACs do; above 1
the chain is slower than the layer.

    python -m benchmarks.pays
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.support.machine import describe_machine, describe_versions
from tdecomp.decomposers.registry import get_decomposer
from tdecomp.layers.cost import chain_cost
from tdecomp.layers.spec import Call, LayerSpec
from tdecomp.pictures.style import looks_of
from tdecomp.ranks.grid import Rounding
from tdecomp.timing.profile import timed_ranks
from tdecomp.timing.stopwatch import THIS_MACHINE, TimingEffort

# Channels, and the side of the maps that layers so wide see in the usual networks.
SIZES = ((64, 56), (128, 28), (256, 14), (512, 7))
BATCHES = (1, 8)
METHODS = ("lowrank", "spatial", "tucker2", "cp", "cp-separable")
ROUNDS = 9
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "time_against_macs.png"


@dataclass(frozen=True)
class Point:
    """One chain: its share of the layer's MACs, and of its time."""

    channels: int
    side: int
    batch: int
    method: str
    rank: str
    macs: float
    time: float
    low: float
    high: float


def measure(channels: int, side: int, batch: int, multiple: int, count: int) -> Iterator[Point]:
    """The chains of one layer, all timed in the same rounds as the layer."""
    spec = LayerSpec.of(torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False))
    call = Call(batch, (side, side))
    chains = []
    for method in METHODS:
        decomposer = get_decomposer(method)
        for rank in timed_ranks(decomposer, spec, call, Rounding(multiple), count):
            chains.append((method, str(rank), tuple(decomposer.stages(spec, rank))))
    seconds = THIS_MACHINE.layers(
        [(spec,), *(stages for _, _, stages in chains)],
        call,
        "channels_last",
        torch.device("cpu"),
        torch.float32,
        TimingEffort(count, ROUNDS, 0.003),
    )
    shares = seconds[:, 1:] / seconds[:, :1]
    whole = chain_cost((spec,), (call,)).amount
    for (method, at, stages), column in zip(chains, shares.T, strict=True):
        low, median, high = np.percentile(column, [25, 50, 75]).tolist()
        macs = chain_cost(stages, (call,)).amount / whole
        yield Point(channels, side, batch, method, at, macs, median, low, high)


def draw(points: Sequence[Point], path: Path) -> None:
    """One panel for each size and batch."""
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    panels = figure.subplots(len(BATCHES), len(SIZES), sharex=True, sharey=True)
    for row, batch in zip(panels, BATCHES, strict=True):
        for axes, (channels, side) in zip(row, SIZES, strict=True):
            axes.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
            axes.axhline(1.0, color="grey", linewidth=1)
            for method, look in looks_of(METHODS).items():
                mine = _of(points, channels, batch, method)
                axes.plot(
                    [p.macs for p in mine],
                    [p.time for p in mine],
                    marker=look.marker,
                    color=look.colour,
                    markersize=4,
                    linewidth=1.2,
                    label=method,
                )
            axes.set_title(f"{channels} channels, {side}×{side}, batch {batch}", fontsize=9)
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 2)
            axes.grid(alpha=0.25)
    for axes in panels[-1]:
        axes.set_xlabel("MACs / the layer's")
    for row in panels:
        row[0].set_ylabel("time / the layer's")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.suptitle("3×3 convolutions: below 1 a chain is faster than the layer", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def at_half(points: Sequence[Point]) -> Mapping[str, list[str]]:
    """Each method's time at half the MACs, between the points measured, by layer."""
    columns: dict[str, list[str]] = {"layer": []}
    for batch in BATCHES:
        for channels, side in SIZES:
            columns["layer"].append(f"{channels}, {side}×{side}, batch {batch}")
            for method in METHODS:
                mine = _of(points, channels, batch, method)
                macs, times = [p.macs for p in mine], [p.time for p in mine]
                inside = bool(mine) and macs[0] <= 0.5 <= macs[-1]
                cell = f"{float(np.interp(0.5, macs, times)):.2f}" if inside else "–"
                columns.setdefault(method, []).append(cell)
    return columns


def _of(points: Sequence[Point], channels: int, batch: int, method: str) -> list[Point]:
    """The points of one line, by MACs."""
    mine = [p for p in points if (p.channels, p.batch, p.method) == (channels, batch, method)]
    return sorted(mine, key=lambda point: point.macs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the times at half the MACs and draw all of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pays",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=FIGURE, help="PNG file (the site's)")
    parser.add_argument("--points", type=int, default=6, help="ranks of each method (6)")
    parser.add_argument("--multiple", type=int, default=16, help="of ranks (16)")
    options = parser.parse_args(arguments)
    work = [(channels, side, batch) for batch in BATCHES for channels, side in SIZES]
    points = [
        point
        for channels, side, batch in tqdm(work, desc="layers", leave=False)
        for point in measure(channels, side, batch, options.multiple, options.points)
    ]
    draw(points, options.out)
    print("time at half the MACs, of the layer's\n")
    print(tabulate(at_half(points), headers="keys", disable_numparse=True))
    spread = float(np.median([(p.high - p.low) / p.time for p in points]))
    machine = describe_machine()
    print(f"\nquartiles typically {spread:.0%} apart; {machine | describe_versions()}")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
