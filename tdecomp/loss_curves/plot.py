"""Pictures: figures that a notebook shows, and one small panel for each layer."""

import io
import math
from collections.abc import Mapping, Sequence
from itertools import cycle

from matplotlib.figure import Figure

# Colours that people with colour blindness tell apart (Okabe and Ito 2008).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_COLUMNS = 4
# Shares of the cost, errors, and whether each was computed rather than interpolated.
Series = tuple[Sequence[float], Sequence[float], Sequence[bool]]


class NotebookFigure(Figure):
    """A figure that a notebook shows, whether or not pyplot was imported."""

    def _repr_png_(self) -> bytes:
        drawn = io.BytesIO()
        self.savefig(drawn, format="png")
        return drawn.getvalue()


def small_multiples(
    panels: Mapping[str, Mapping[str, Series]], *, x_label: str, y_label: str
) -> Figure:
    """One panel for each layer with a line for each method; dots where it was computed."""
    columns = min(_COLUMNS, max(len(panels), 1))
    rows = max(1, math.ceil(len(panels) / columns))
    figure = NotebookFigure(figsize=(2.6 * columns, 1.9 * rows + 1.0), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    methods = list(dict.fromkeys(method for panel in panels.values() for method in panel))
    colours = dict(zip(methods, cycle(_COLOURS), strict=False))
    for i, (axis, (title, panel)) in enumerate(zip(axes.flat, panels.items(), strict=False)):
        for method, (shares, errors, computed) in panel.items():
            axis.plot(shares, errors, color=colours[method], linewidth=1.2, label=method)
            if not all(computed):
                marked = [i for i, known in enumerate(computed) if known]
                style = {"color": colours[method], "markersize": 3, "markevery": marked}
                axis.plot(shares, errors, "o", **style)
        axis.set_title(title, fontsize=8)
        axis.set_xlim(0, 1)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=7, labelbottom=i + columns >= len(panels))
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    lines = {line.get_label(): line for a in axes.flat for line in a.get_lines()}
    named = [method for method in methods if method in lines]
    if named:
        handles = [lines[method] for method in named]
        figure.legend(handles, named, loc="outside upper left", ncols=6, frameon=False)
    figure.supxlabel(x_label, fontsize=9)
    figure.supylabel(y_label, fontsize=9)
    return figure
