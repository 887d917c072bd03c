"""The picture of a report: each layer's cost before and after, and its error."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from tdecomp.loss_curves.plot import NotebookFigure

# Of the costs before and after: the name, the height and the colour of the bars.
_BARS = (("before", 0.8, "#c9d3df"), ("after", 0.4, "#1f5fa8"))


def bars_and_errors(
    labels: Sequence[str],
    costs: Sequence[tuple[int, int]],
    errors: Sequence[float | None],
    unit: str,
) -> Figure:
    """The costs before and after as bars for each label and, if there are any errors, dots."""
    known = [(place, error) for place, error in enumerate(errors) if error is not None]
    ratios = [3, 1] if known else [1]
    figure = NotebookFigure(figsize=(9, 0.24 * max(len(labels), 4) + 1.6), layout="constrained")
    panels = figure.subplots(1, len(ratios), sharey=True, squeeze=False, width_ratios=ratios)[0]

    positions = range(len(labels))
    for i, (name, height, colour) in enumerate(_BARS):
        lengths = [cost[i] for cost in costs]
        panels[0].barh(positions, lengths, height=height, color=colour, label=name)
    panels[0].set_yticks(positions, labels, fontsize=8)
    panels[0].set_ylim(len(labels) - 0.4, -0.6)
    panels[0].set_xlabel(unit)
    panels[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    if known:
        places, shown = zip(*known, strict=True)
        panels[1].plot(shown, places, "o", color="#c05010")
        panels[1].set_xlim(0, 1.1 * max(1.0, *shown))
        panels[1].set_xlabel("weight error")
        panels[1].grid(axis="x", alpha=0.3)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    return figure
