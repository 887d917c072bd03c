"""A comparison as curves over the shares, against MACs and against measured time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.support.rows import NO_RECOVERY, ORIGINAL, Row
from benchmarks.support.settings import BUDGET, GROUPS
from benchmarks.support.summary import (
    Line,
    best_of,
    curve_in_words,
    each_once,
    lines_of,
    stage_in_words,
    stages_of,
)
from benchmarks.support.today import TODAY
from tdecomp.pictures.figure import bare
from tdecomp.pictures.style import SMALL, TEXT, WIDTH, looks_of

X_AXES = {"macs_share": "MACs / the original's", "time_share": "measured time / the original's"}
_PANEL = 2.3  # inches
_TITLE = 90  # characters in a line


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
    """Write an SVG file of the quality, the output error or the time; False if there is none."""
    figure = comparison_figure(rows, y, title)
    if figure is None:
        return False
    with rc_context({"svg.hashsalt": "compare"}):  # the same picture is the same file
        figure.savefig(path, metadata={"Date": None})
    return True


def comparison_figure(rows: Sequence[Row], y: str, title: str) -> Figure | None:
    """A row of panels for each stage; time has one panel, against MACs."""
    lines = lines_of(rows)
    stages = [stage for stage in stages_of(lines) if any(_at(lines, stage, y))]
    axes_x = {name: label for name, label in X_AXES.items() if name != y}
    if y == "time_share":  # no step after the decomposition changes it
        lines = [replace(line, run=replace(line.run, recover=NO_RECOVERY, finetune=0))
                 for line in each_once(lines, y)]  # fmt: skip
        stages = stages_of(lines)
    if not stages:
        return None
    styles = styles_of(lines)
    figure = Figure(figsize=(WIDTH, _PANEL * len(stages) + 1.3), layout="constrained")
    panels = figure.subplots(
        len(stages), len(axes_x), sharex="col", sharey=y == "quality", squeeze=False
    )
    for row, stage in zip(panels, stages, strict=True):
        for axes, x in zip(row, axes_x, strict=True):
            _draw(axes, _at(lines, stage, y), x, y, styles)
        row[0].set_ylabel(_label(rows, y))
        if len(stages) > 1:
            row[0].set_title(stage_in_words(stage), loc="left", fontsize=TEXT)
    for axes, label in zip(panels[-1], axes_x.values(), strict=True):
        axes.set_xlabel(label)
        axes.set_xlim(left=0)  # the last: it ends autoscaling for the panels above, too
    handles = [
        Line2D([], [], label=curve_in_words(name), **_drawn(style))
        for name, style in styles.items()
    ]
    handles.append(Line2D([], [], ls="--", color="black", lw=0.8, label=ORIGINAL))
    handles.append(
        Line2D([], [], ls="", marker="o", mfc="none", mec="black", ms=11, label="best of a share")
    )
    figure.legend(
        handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=SMALL
    )
    figure.suptitle(fill(title, _TITLE), fontsize=TEXT + 1, parse_math=False)
    return figure


@dataclass(frozen=True)
class _Style:
    """How a curve is drawn: dashed and hollow for weights, dotted for the ways of today.

    Dashed and dotted for one method under a budget, whose fit the marker tells.
    """

    colour: str
    marker: str
    line: str
    fill: str


def styles_of(lines: Sequence[Line]) -> dict[tuple[str, str, str], _Style]:
    """The ways of today have the colour of the method with the same chain."""
    names = list(dict.fromkeys(line.curve for line in lines if line.run.method != ORIGINAL))
    alike = {name: TODAY[name].like if name in TODAY else name for name, _, _ in names}
    looks = looks_of([*alike.values(), *alike])
    styles = {}
    for name in names:
        method, fitted, ranks = name
        colour = looks[alike[method]].colour
        line = ":" if method in TODAY else "-" if fitted == "data" else "--"
        if ranks == BUDGET and method not in GROUPS:
            line = "-."
        fill = colour if fitted == "data" else "white"
        styles[name] = _Style(colour, looks[method].marker, line, fill)
    return styles


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
    axes: Axes, lines: Sequence[Line], x: str, y: str, styles: dict[tuple[str, str, str], _Style]
) -> None:
    for curve in curves_of(lines, x, y):
        style = styles[curve.name]
        axes.plot(curve.x, curve.y, **_drawn(style))
        axes.vlines(curve.x, curve.low, curve.high, color=style.colour, lw=1.1)
    for line in chain.from_iterable(best_of(lines, y).values()):
        axes.plot(line.mean(x), line.mean(y), "o", ms=11, mfc="none", mec="black", mew=0.9)
    for line in lines:
        if line.run.method == ORIGINAL and y != "output_error":
            axes.axhline(line.mean(y), ls="--", color="black", lw=0.8, zorder=0)
    if y == "output_error":
        axes.set_yscale("log")
    axes.grid(alpha=0.3, lw=0.5)
    bare(axes)
    axes.tick_params(labelsize=SMALL)


def _label(rows: Sequence[Row], y: str) -> str:
    measure = next((row.found.measure for row in rows if row.found.measure), None)
    return {"quality": measure or "", "output_error": "output error"}.get(y, X_AXES.get(y, ""))


def _drawn(style: _Style) -> dict[str, Any]:
    return {
        "ls": style.line, "marker": style.marker, "color": style.colour, "mfc": style.fill,
        "ms": 4.5, "lw": 1.1,
    }  # fmt: skip
