"""A comparison as a picture: accuracy against MACs and against measured latency."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import offset_copy

from benchmarks.support.comparison import ORIGINAL, Measurement
from benchmarks.support.settings import BUDGET
from benchmarks.support.timing import Latency

# Okabe & Ito's colours, which stay apart for the colour-blind; black is the original's.
COLOURS = ("#0072b2", "#56b4e9", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
MARKERS = ("o", "s", "D", "^", "v", "P")
RING, DOT = 10, 5
SAME_MACS = 0.03
MARKER_WIDTH = 11  # points
TINT = 0.35  # how much of its colour a ring holds for fits to data


@dataclass(frozen=True)
class Style:
    """How a method is drawn."""

    colour: str
    marker: str


@dataclass(frozen=True)
class Place:
    """Where a network stands on an x axis, and by how many points it is moved beside others."""

    x: float
    spread: tuple[float, float] | None = None
    shift: float = 0.0


def draw_comparison(
    measurements: Sequence[Measurement], path: Path, *, title: str, finetune: int
) -> None:
    """Write a PNG; without accuracies it shows latency against MACs."""
    styles = _styles(measurements)
    macs = _macs_places(measurements)
    latency = {m.label: _latency_place(m.latency) for m in measurements if m.latency is not None}
    if measurements[0].accuracy_before is None:
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        _draw_latencies(axes, measurements, latency, styles)
    else:
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _draw_accuracies(left, measurements, macs, styles)
        _draw_accuracies(right, measurements, latency, styles)
        left.set_ylabel("accuracy")
        left.yaxis.set_major_formatter(PercentFormatter(1.0))
        _finish(left, "MACs / the original's (ties side by side)")
        _finish(right, "measured latency / the original's")
    handles = _legend(styles, finetune, data=any(m.data for m in measurements))
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)


def _styles(measurements: Sequence[Measurement]) -> dict[str, Style]:
    styles = {}
    for i, method in enumerate(dict.fromkeys(m.method for m in measurements if m.method)):
        marker = (i + i // len(COLOURS)) % len(MARKERS)  # a second lap pairs them anew
        styles[method] = Style(COLOURS[i % len(COLOURS)], MARKERS[marker])
    return {ORIGINAL: Style("black", "*")} | styles


def _macs_places(measurements: Sequence[Measurement]) -> dict[str, Place]:
    """Where several networks have about the same MACs, as is the point, they stand side by side.

    Fits of one method, to weights and to data, stand above each other.
    """
    groups: list[list[Measurement]] = []
    for m in sorted(measurements, key=lambda m: m.macs_ratio):
        if groups and m.macs_ratio - groups[-1][0].macs_ratio < SAME_MACS:
            groups[-1].append(m)
        else:
            groups.append([m])
    order = {m.label: i for i, m in enumerate(measurements)}
    places = {}
    for group in groups:
        group.sort(key=lambda m: order[m.label])
        columns = list(dict.fromkeys((m.method, m.rank) for m in group))
        for m in group:
            shift = MARKER_WIDTH * (columns.index((m.method, m.rank)) - (len(columns) - 1) / 2)
            places[m.label] = Place(m.macs_ratio, shift=shift)
    return places


def _latency_place(latency: Latency) -> Place:
    return Place(latency.ratio, latency.ratio_quartiles)


def _draw_accuracies(
    axes: Axes,
    measurements: Sequence[Measurement],
    places: dict[str, Place],
    styles: dict[str, Style],
) -> None:
    """A ring before fine-tuning, a dot after it, and a line between them."""
    for m in measurements:
        style, place = styles[m.method or ORIGINAL], places[m.label]
        points = [y for y in (m.accuracy_before, m.accuracy_after) if y is not None]
        moved = offset_copy(axes.transData, axes.get_figure(root=True), place.shift, units="points")
        lines = axes.plot([place.x] * len(points), points, lw=1, ls=":")
        fill = _tinted(style.colour) if m.data else "none"
        lines += axes.plot(place.x, points[0], style.marker, ms=RING, mfc=fill, mew=1.3)
        if len(points) > 1:
            lines += axes.plot(place.x, points[1], style.marker, ms=DOT)
        if place.spread is not None:
            lines += axes.plot(place.spread, [points[-1]] * 2, lw=1.5, alpha=0.6)
        for line in lines:  # moved only now: a moved line no longer counts for the axes' limits
            line.set(color=style.colour, transform=moved)
            if line.get_markersize() == RING:
                line.set_markerfacecolor(fill)
        _name_rank(axes, m, place.x, points[-1], style)


def _draw_latencies(
    axes: Axes,
    measurements: Sequence[Measurement],
    places: dict[str, Place],
    styles: dict[str, Style],
) -> None:
    by_method = defaultdict(list)
    for m in measurements:
        style, place = styles[m.method or ORIGINAL], places[m.label]
        axes.plot(m.macs_ratio, place.x, style.marker, ms=8, color=style.colour)
        if place.spread is not None:
            axes.plot([m.macs_ratio] * 2, place.spread, lw=1.5, color=style.colour)
        by_method[m.method].append((m.macs_ratio, place.x))
        _name_rank(axes, m, m.macs_ratio, place.x, style)
    for method, points in by_method.items():
        axes.plot(
            *zip(*sorted(points), strict=True), lw=0.8, color=styles[method or ORIGINAL].colour
        )
    axes.set_ylabel("measured latency / the original's")
    axes.axhline(1.0, color="grey", lw=0.8, ls="--", zorder=0)
    axes.set_ylim(bottom=0)
    _finish(axes, "MACs / the original's")


def _name_rank(axes: Axes, m: Measurement, x: float, y: float, style: Style) -> None:
    """Say the ranks that the MACs do not tell, once."""
    if m.rank is None or m.data:
        return
    if not m.rank.removeprefix(f"{BUDGET}:").replace(".", "").isdecimal():
        offset = (8, 4)
        axes.annotate(
            m.rank, (x, y), offset, textcoords="offset points", fontsize=8, color=style.colour
        )


def _finish(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.set_xlim(-0.1, max(1.1, axes.get_xlim()[1]))  # room for ties beside a small share
    axes.axvline(1.0, color="grey", lw=0.8, ls="--", zorder=0)
    axes.grid(alpha=0.3, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _tinted(colour: str) -> tuple[float, float, float]:
    """A pale form of a colour; transparency would also fade the edge of a marker."""
    red, green, blue = (1 - TINT * (1 - part) for part in to_rgb(colour))
    return red, green, blue


def _legend(styles: dict[str, Style], finetune: int, *, data: bool) -> list[Line2D]:
    def entry(label: str, colour: str, marker: str, size: int, fill: Any = None) -> Line2D:
        return Line2D(
            [], [], ls="", marker=marker, color=colour, ms=size, mfc=fill or colour, label=label
        )

    handles = [entry(method, style.colour, style.marker, 8) for method, style in styles.items()]
    if data:
        handles.append(entry("fitted to weights", "grey", "o", RING, "none"))
        handles.append(entry("fitted to data", "grey", "o", RING, _tinted("grey")))
    elif finetune:
        handles.append(entry("before fine-tuning", "grey", "o", RING, "none"))
    if finetune:
        handles.append(entry(f"after {finetune} steps", "grey", "o", DOT))
    return handles
