"""The picture of a plan or a report: each layer's cost before and after, its time, its errors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator

from tdecomp.layers.cost import count_in_words
from tdecomp.pictures.figure import NotebookFigure, bare
from tdecomp.pictures.style import (
    DARK,
    GREY,
    LIGHT,
    SMALL,
    WIDTH,
    Look,
    largest,
    looks_of,
    shortened,
)

_MOST = 32  # of the layers; the largest are shown
# How the markers of each error are filled; that of the weight is hollow.
FILLS: dict[str, Any] = {"weight error": "none", "output error": "full", "expected error": "full"}

Pair = tuple[float, float]


@dataclass(frozen=True)
class LayerBars:
    """What the picture shows of one layer."""

    name: str
    method: str | None  # None where it is left alone
    cost: Pair  # before and after
    seconds: Pair | None = None
    errors: dict[str, Pair] = field(default_factory=dict)  # by a key of FILLS, with the margin


def costs_and_errors(layers: Sequence[LayerBars], unit: str) -> Figure:
    """A line for each layer: bars of its cost, and of its time where known, and its errors."""
    shown = largest(layers, lambda layer: layer.cost[0], _MOST)
    others = [layer for layer in layers if layer not in shown]
    looks = looks_of(layer.method for layer in shown if layer.method)
    kinds = [kind for kind in FILLS if any(kind in layer.errors for layer in shown)]
    timed = any(layer.seconds for layer in shown)
    ratios = [3, *([2] if timed else []), *([2] if kinds else [])]
    lines = len(shown) + bool(others)
    figure = NotebookFigure(figsize=(WIDTH, 0.2 * max(lines, 4) + 1.3), layout="constrained")
    panels = figure.subplots(1, len(ratios), sharey=True, squeeze=False, width_ratios=ratios)[0]

    names = [shortened(layer.name) for layer in shown]
    names += [f"and {len(others)} more"] if others else []
    panels[0].set_yticks(range(lines), names, fontsize=SMALL, parse_math=False)
    panels[0].set_ylim(lines - 0.4, -0.6)
    _draw_bars(panels[0], shown, looks, lambda layer: layer.cost)
    panels[0].set_xlabel(unit, fontsize=SMALL)
    panels[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    if others:
        before, after = (sum(layer.cost[i] for layer in others) for i in range(2))
        words = f" {count_in_words(before)} → {count_in_words(after)}"
        panels[0].text(0, len(shown), words, fontsize=SMALL, va="center")
    if timed:
        _draw_bars(panels[1], shown, looks, _milliseconds)
        panels[1].set_xlabel("measured ms", fontsize=SMALL)
    if kinds:
        _draw_errors(panels[-1], shown, looks, kinds)
    for panel in panels:
        bare(panel)
        panel.tick_params(labelsize=SMALL)
        panel.xaxis.set_major_locator(MaxNLocator(5 if panel is panels[0] else 4))
    handles = _legend(shown, looks, kinds)
    figure.legend(handles=handles, loc="outside upper left", ncols=5, frameon=False, fontsize=SMALL)
    return figure


def _milliseconds(layer: LayerBars) -> Pair:
    before, after = layer.seconds or (0.0, 0.0)
    return 1e3 * before, 1e3 * after


def _draw_bars(
    axes: Axes,
    layers: Sequence[LayerBars],
    looks: dict[str, Look],
    value: Callable[[LayerBars], Pair],
) -> None:
    """Before as a light bar, after as a narrow one in it, in the colour and hatch of the method."""
    axes.barh(range(len(layers)), [value(layer)[0] for layer in layers], 0.86, color=LIGHT)
    for place, layer in enumerate(layers):
        look = looks.get(layer.method or "")
        style: dict[str, Any] = {"color": GREY}
        if look is not None:
            style = {"facecolor": look.colour, "hatch": look.hatch}
        axes.barh(place, value(layer)[1], 0.5, edgecolor="white", linewidth=0, **style)


def _draw_errors(
    axes: Axes, layers: Sequence[LayerBars], looks: dict[str, Look], kinds: Sequence[str]
) -> None:
    for place, layer in enumerate(layers):
        for kind, (error, margin) in layer.errors.items():
            look = looks[layer.method or ""]
            axes.errorbar(
                error, place, xerr=margin or None, fmt=look.marker, color=look.colour, markersize=5,
                fillstyle=FILLS[kind], capsize=2, elinewidth=1,
            )  # fmt: skip
    axes.margins(x=0.08)
    axes.set_xlim(left=0)  # after the margins: it ends autoscaling
    axes.set_xlabel(" and ".join(kinds), fontsize=SMALL)
    axes.grid(axis="x", color=LIGHT)
    axes.set_axisbelow(True)


def _legend(
    layers: Sequence[LayerBars], looks: dict[str, Look], kinds: Sequence[str]
) -> list[Artist]:
    handles: list[Artist] = [Patch(facecolor=LIGHT, label="before")]
    handles += [
        Patch(facecolor=look.colour, hatch=look.hatch, edgecolor="white", linewidth=0, label=method)
        for method, look in looks.items()
    ]
    if any(layer.method is None for layer in layers):
        handles.append(Patch(facecolor=GREY, label="left alone"))
    return handles + [
        Line2D([], [], marker="o", linestyle="", color=DARK, fillstyle=FILLS[kind], label=kind)
        for kind in kinds
    ]
