"""Figures that a notebook shows, and that a page can hold."""

import io

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """A figure that a notebook shows, whether or not pyplot was imported."""

    def _repr_png_(self) -> bytes:
        drawn = io.BytesIO()
        self.savefig(drawn, format="png")
        return drawn.getvalue()


def as_svg(figure: Figure) -> str:
    """The figure as SVG, the same for the same figure, its words as text."""
    drawn = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tdecomp"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def bare(axes: Axes) -> None:
    """Without the lines at the top and at the right."""
    axes.spines[["top", "right"]].set_visible(False)
