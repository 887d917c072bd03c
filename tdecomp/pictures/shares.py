"""The picture of a search: what each share kept of the quality."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from tdecomp.pictures.figure import NotebookFigure, bare
from tdecomp.pictures.style import DARK, KEPT, LOST, SMALL, TEXT, WIDTH

# Values further below the limit than this many times what may be lost are drawn at the lower edge.
_DEPTH = 3
_TICKS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
Point = tuple[float, float, float, bool]  # share, quality, margin, whether that is kept


def quality_against_share(
    points: Sequence[Point],
    chosen: Point | None,
    *,
    original: float,
    limit: float,
    unit: str,
    ax: Axes | None,
) -> Figure:
    """A dot for each share with its noise, the original's level and the limit as lines."""
    if ax is None:
        ax = NotebookFigure(figsize=(0.8 * WIDTH, 3.4), layout="constrained").subplots()
    ax.axhline(original, color=DARK, linewidth=1, label="original")
    ax.axhline(limit, color=DARK, linewidth=1, linestyle="--", label="limit")
    allowed = original - limit
    lowest = min((point[1] - point[2] for point in points), default=limit)
    bottom = limit - _DEPTH * allowed if allowed > 0 else lowest
    for kept, colour, fill in ((True, KEPT, "full"), (False, LOST, "none")):
        look: dict[str, Any] = {"color": colour, "fillstyle": fill}
        label = "kept" if kept else "not kept"
        for share, value, margin, _ in (p for p in points if p[3] == kept):
            if value < bottom:
                ax.plot(share, bottom, "v", clip_on=False, label=label, **look)
                ax.annotate(
                    f"{value:.4g}", (share, bottom), (4, 4), textcoords="offset points",
                    fontsize=SMALL,
                )  # fmt: skip
            else:
                ax.errorbar(share, value, margin or None, fmt="o", capsize=3, label=label, **look)
            label = "_"  # which a legend leaves out
    if chosen is not None:
        ax.plot(*chosen[:2], "o", markersize=12, fillstyle="none", color=KEPT)
        ax.set_title(f"chosen: {chosen[0]:.3g} of the {unit}", fontsize=TEXT, color=KEPT)
    if lowest < bottom:
        ax.set_ylim(bottom=bottom)
    ax.set_xscale("log")
    ax.set_xlim(0.9 * min((point[0] for point in points), default=0.5), 1.05)
    ax.xaxis.set_minor_formatter(NullFormatter())
    ticks = [tick for tick in _TICKS if tick >= ax.get_xlim()[0]]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xlabel(f"share of the {unit}", fontsize=TEXT)
    ax.set_ylabel("quality", fontsize=TEXT)
    ax.tick_params(labelsize=SMALL)
    bare(ax)
    ax.legend(frameon=False, fontsize=SMALL, loc="lower right")
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure
