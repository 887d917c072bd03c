"""The picture of what layers lose: one small panel for each, a line for each method."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from tdecomp.pictures.figure import NotebookFigure, bare
from tdecomp.pictures.style import LIGHT, SMALL, TEXT, WIDTH, looks_of, shortened

_COLUMNS = 4
_TITLE = 24  # characters that fit above a panel
# Shares of the cost, errors, and whether each was computed rather than interpolated.
Series = tuple[Sequence[float], Sequence[float], Sequence[bool]]


def small_multiples(
    panels: Mapping[str, Mapping[str, Series]], *, x_label: str, y_label: str
) -> Figure:
    """One panel for each layer with a line for each method; marked where it was computed."""
    columns = min(_COLUMNS, max(len(panels), 1))
    rows = max(1, math.ceil(len(panels) / columns))
    size = (max(WIDTH * columns / _COLUMNS, 4.0), 1.5 * rows + 1.1)
    figure = NotebookFigure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    looks = looks_of(method for panel in panels.values() for method in panel)
    for i, (axis, (title, panel)) in enumerate(zip(axes.flat, panels.items(), strict=False)):
        for method, (shares, errors, computed) in panel.items():
            look, marked = looks[method], [i for i, known in enumerate(computed) if known]
            axis.plot(
                shares, errors, color=look.colour, linestyle=look.dashes, linewidth=1.2,
                marker=look.marker, markersize=3, markevery=_spread(marked), label=method,
                clip_on=False,  # markers at the edge are whole
            )  # fmt: skip
        axis.set_title(shortened(title, _TITLE), fontsize=SMALL, parse_math=False)
        axis.set_xlim(0, 1)
        axis.grid(color=LIGHT)
        axis.tick_params(labelsize=SMALL - 1, labelbottom=i + columns >= len(panels))
        bare(axis)
    # Last, as it ends the choice of limits: they are those of all panels.
    axes[0, 0].set_ylim(bottom=0)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    lines = {line.get_label(): line for a in axes.flat for line in a.get_lines()}
    named = [method for method in looks if method in lines]
    if named:
        figure.legend(
            [lines[method] for method in named], named, loc="outside upper left", ncols=6,
            frameon=False, fontsize=SMALL, handlelength=3,
        )  # fmt: skip
    figure.supxlabel(x_label, fontsize=TEXT)
    figure.supylabel(y_label, fontsize=TEXT)
    return figure


def _spread(places: list[int]) -> list[int]:
    """At most about a dozen of them, the first and the last included."""
    step = max(1, round(len(places) / 12))
    return sorted({*places[::step], *places[-1:]})
