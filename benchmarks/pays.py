"""When does each method pay: measured time against MACs, over sizes of layers.

Single convolutions in channels_last, and their chains at several ranks, timed in the same rounds:
3×3 with as many outputs as inputs, and the 1×1 that make a ResNet-50's blocks narrow. The picture
is of the former; on its dashed line time falls as fast as MACs do, above 1 the chain is slower than
the layer. The tables, at half of the MACs, lie between the picture's points.

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
from tdecomp.layers.geometry import Call
from tdecomp.layers.spec import LayerSpec
from tdecomp.pictures.figure import as_svg
from tdecomp.pictures.style import SMALL, WIDTH, looks_of
from tdecomp.ranks.grid import Rounding
from tdecomp.timing.profile import timed_ranks
from tdecomp.timing.stopwatch import THIS_MACHINE, TimingEffort

BATCHES = (1, 8)
METHODS = ("lowrank", "spatial", "tucker2", "cp", "cp-separable")
POINTWISE_METHODS = ("svd",)
ROUNDS = 9
FIGURES = Path(__file__).parents[1] / "docs" / "figures"


@dataclass(frozen=True)
class Size:
    """A convolution, with the side of the maps that layers so wide see in the usual networks."""

    inputs: int
    outputs: int
    kernel: int
    side: int

    @property
    def spec(self) -> LayerSpec:
        padding = self.kernel // 2
        layer = torch.nn.Conv2d(self.inputs, self.outputs, self.kernel, padding=padding, bias=False)
        return LayerSpec.of(layer)

    def __str__(self) -> str:
        same = self.inputs == self.outputs
        channels = f"{self.inputs}" if same else f"{self.inputs}→{self.outputs}"
        return f"{channels} channels, {self.side}×{self.side}"


SIZES = [Size(channels, channels, 3, 3584 // channels) for channels in (64, 128, 256, 512)]
POINTWISE = [Size(4 * c, c, 1, 3584 // c) for c in (64, 128, 256, 512)]


@dataclass(frozen=True)
class Point:
    """One chain: its share of the layer's MACs, and of its time."""

    size: Size
    batch: int
    method: str
    rank: str
    macs: float
    time: float
    low: float
    high: float


def measure(size: Size, batch: int, multiple: int, count: int) -> Iterator[Point]:
    """The chains of one layer, all timed in the same rounds as the layer."""
    spec, call = size.spec, Call(batch, (size.side, size.side))
    chains = []
    for method in METHODS if size.kernel > 1 else POINTWISE_METHODS:
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
        yield Point(size, batch, method, at, macs, median, low, high)


def draw(points: Sequence[Point], path: Path) -> None:
    """One panel for each 3×3 convolution and batch."""
    figure = Figure(figsize=(WIDTH, 4.8), layout="constrained")
    panels = figure.subplots(len(BATCHES), len(SIZES), sharex=True, sharey=True)
    for row, batch in zip(panels, BATCHES, strict=True):
        for axes, size in zip(row, SIZES, strict=True):
            axes.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
            axes.axhline(1.0, color="grey", linewidth=1)
            for method, look in looks_of(METHODS).items():
                mine = _of(points, size, batch, method)
                axes.plot(
                    [p.macs for p in mine], [p.time for p in mine], label=method,
                    marker=look.marker, color=look.colour, linestyle=look.dashes, markersize=4,
                    linewidth=1.2,
                )  # fmt: skip
            axes.set_title(f"{size},\nbatch {batch}", fontsize=SMALL)
            axes.tick_params(labelsize=SMALL)
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 2)
            axes.grid(alpha=0.25)
    for axes in panels[-1]:
        axes.set_xlabel("MACs / the layer's")
    for row in panels:
        row[0].set_ylabel("time / the layer's")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=5, frameon=False, fontsize=SMALL,
        handlelength=3,
    )  # fmt: skip
    path.write_text(as_svg(figure), encoding="utf-8")


def at_half(
    points: Sequence[Point], sizes: Sequence[Size], methods: Sequence[str]
) -> Mapping[str, list[str]]:
    """Each method's time at half the MACs, between the points measured, by layer."""
    columns: dict[str, list[str]] = {"layer": []}
    for batch in BATCHES:
        for size in sizes:
            columns["layer"].append(f"{size}, batch {batch}")
            for method in methods:
                mine = _of(points, size, batch, method)
                macs, times = [p.macs for p in mine], [p.time for p in mine]
                inside = bool(mine) and macs[0] <= 0.5 <= macs[-1]
                cell = f"{float(np.interp(0.5, macs, times)):.2f}" if inside else "–"
                columns.setdefault(method, []).append(cell)
    return columns


def tables(points: Sequence[Point], style: str) -> str:
    """The 3×3 convolutions, then the 1×1."""
    kinds = {"3×3": (SIZES, METHODS), "1×1": (POINTWISE, POINTWISE_METHODS)}
    parts = []
    for kind, (sizes, methods) in kinds.items():
        found = dict(at_half(points, sizes, methods))
        columns = {f"{kind} convolution": found.pop("layer"), **found}
        align = ["left", *["right"] * len(methods)]
        parts.append(
            tabulate(columns, "keys", tablefmt=style, disable_numparse=True, colalign=align)
        )
    return "\n\n".join(parts)


def _of(points: Sequence[Point], size: Size, batch: int, method: str) -> list[Point]:
    """The points of one line, by MACs."""
    mine = [p for p in points if (p.size, p.batch, p.method) == (size, batch, method)]
    return sorted(mine, key=lambda point: point.macs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the times at half the MACs and draw all of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pays",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder (the site's pictures)")
    parser.add_argument("--points", type=int, default=6, help="ranks of each method (6)")
    parser.add_argument("--multiple", type=int, default=16, help="of ranks (16)")
    options = parser.parse_args(arguments)
    work = [(size, batch) for batch in BATCHES for size in (*SIZES, *POINTWISE)]
    points = [
        point
        for size, batch in tqdm(work, desc="layers", leave=False)
        for point in measure(size, batch, options.multiple, options.points)
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    picture, table = options.out / "time_against_macs.svg", options.out / "time_at_half.txt"
    draw(points, picture)
    table.write_text(tables(points, "github") + "\n", encoding="utf-8")
    print(f"time at half the MACs, of the layer's\n\n{tables(points, 'simple')}")
    spread = float(np.median([(p.high - p.low) / p.time for p in points]))
    machine = describe_machine()
    print(f"\nquartiles typically {spread:.0%} apart; {machine | describe_versions()}")
    print(f"written: {picture}\nwritten: {table}")


if __name__ == "__main__":
    main()
