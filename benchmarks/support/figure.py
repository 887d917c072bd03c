"""A comparison as curves over the shares, against MACs and against measured time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.support.rows import ORIGINAL, Row
from benchmarks.support.summary import (
    Line,
    best_of,
    curve_in_words,
    lines_of,
    stage_in_words,
    stages_of,
)
from benchmarks.support.today import TODAY

# Okabe & Ito's colours, which stay apart for the colour-blind; black is the original's.
COLOURS = ("#0072b2", "#56b4e9", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
MARKERS = ("o", "s", "D", "^", "v", "P")
X_AXES = {"macs_share": "MACs / the original's", "time_share": "measured time / the original's"}
WIDTH = 7.2  # inches: a page's
_PANEL = 2.3


@dataclass(frozen=True)
class Curve:
    """The points of one method over the shares, where they were measured."""

    name: tuple[str, str, str]
    x: list[float]
    y: list[float]
    low: list[float]  # the spread over seeds
    high: list[float]


def curves_of(lines: Sequence[Line], x: str, y: str) -> list[Curve]:
    """One curve for each method, fit and choice of ranks, from the smallest share."""
    curves = []
    for name in dict.fromkeys(line.curve for line in lines if line.run.method != ORIGINAL):
        points = []
        for line in lines:
            if line.curve == name and line.values(x) and line.values(y):
                across, up, spread = line.mean(x), line.mean(y), line.spread(y) or 0.0
                points.append((line.run.share, across, up, up - spread, up + spread))
        if points:
            _, *columns = map(list, zip(*sorted(points), strict=True))
            curves.append(Curve(name, *columns))
    return curves


def draw_comparison(rows: Sequence[Row], path: Path, *, y: str, title: str) -> bool:
    """Write an SVG file of the quality, the output error or the time; False if there is none.

    A row of panels for each stage; time has one panel, against MACs.
    """
    lines = lines_of(rows)
    stages = [stage for stage in stages_of(lines) if any(_at(lines, stage, y))]
    axes_x = {name: label for name, label in X_AXES.items() if name != y}
    if y == "time_share":  # no step after the decomposition changes it
        stages = stages[:1]
    if not stages:
        return False
    looks = _looks(lines)
    figure = Figure(figsize=(WIDTH, _PANEL * len(stages) + 1.3), layout="constrained")
    panels = figure.subplots(
        len(stages), len(axes_x), sharex="col", sharey=y == "quality", squeeze=False
    )
    for row, stage in zip(panels, stages, strict=True):
        for axes, x in zip(row, axes_x, strict=True):
            _draw(axes, _at(lines, stage, y), x, y, looks)
        row[0].set_ylabel(_label(rows, y))
        if len(stages) > 1:
            row[0].set_title(stage_in_words(stage), loc="left", fontsize=9)
    for axes, label in zip(panels[-1], axes_x.values(), strict=True):
        axes.set_xlabel(label)
    handles = [_handle(curve_in_words(name), look) for name, look in looks.items()]
    handles.append(Line2D([], [], ls="--", color="black", lw=0.8, label=ORIGINAL))
    handles.append(
        Line2D([], [], ls="", marker="o", mfc="none", mec="black", ms=11, label="best of a share")
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=7.5)
    figure.suptitle(title, fontsize=10)
    with rc_context({"svg.hashsalt": "compare"}):  # the same picture is the same file
        figure.savefig(path, metadata={"Date": None})
    return True


@dataclass(frozen=True)
class Look:
    """How a curve is drawn: dashed and hollow for weights, dotted for the ways of today."""

    colour: str
    marker: str
    style: str
    filled: bool


def _looks(lines: Sequence[Line]) -> dict[tuple[str, str, str], Look]:
    names = list(dict.fromkeys(line.curve for line in lines if line.run.method != ORIGINAL))
    methods = list(dict.fromkeys(method for method, _, _ in names))
    looks = {}
    for name in names:
        method, fitted, _ = name
        i = methods.index(method)
        marker = (i + i // len(COLOURS)) % len(MARKERS)  # a second lap pairs them anew
        style = ":" if method in TODAY else "-" if fitted == "data" else "--"
        looks[name] = Look(COLOURS[i % len(COLOURS)], MARKERS[marker], style, fitted == "data")
    return looks


def _at(lines: Sequence[Line], stage: tuple[str, int], y: str) -> list[Line]:
    """The lines of a stage that have a value, with the original's for as much fine-tuning."""
    return [
        line
        for line in lines
        if line.values(y)
        and (
            line.run.stage == stage
            or (line.run.method == ORIGINAL and line.run.finetune == stage[1])
        )
    ]


def _draw(
    axes: Axes, lines: Sequence[Line], x: str, y: str, looks: dict[tuple[str, str, str], Look]
) -> None:
    for curve in curves_of(lines, x, y):
        look = looks[curve.name]
        fill = look.colour if look.filled else "white"
        axes.plot(
            curve.x, curve.y, look.style, marker=look.marker, color=look.colour, mfc=fill,
            ms=4.5, lw=1.1,
        )  # fmt: skip
        axes.vlines(curve.x, curve.low, curve.high, color=look.colour, lw=1.1)
    for line in best_of(lines, y).values():
        axes.plot(line.mean(x), line.mean(y), "o", ms=11, mfc="none", mec="black", mew=0.9)
    for line in lines:
        if line.run.method == ORIGINAL and y != "output_error":
            axes.axhline(line.mean(y), ls="--", color="black", lw=0.8, zorder=0)
    if y == "output_error":
        axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _label(rows: Sequence[Row], y: str) -> str:
    measure = next((row.found.measure for row in rows if row.found.measure), None)
    return {"quality": measure or "", "output_error": "output error"}.get(y, X_AXES.get(y, ""))


def _handle(label: str, look: Look) -> Line2D:
    fill = look.colour if look.filled else "white"
    return Line2D(
        [], [], ls=look.style, marker=look.marker, color=look.colour, mfc=fill, ms=5, label=label
    )
