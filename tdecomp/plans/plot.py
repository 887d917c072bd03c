"""The picture of a report: each layer's cost before and after, and its error."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from tdecomp.loss_curves.plot import NotebookFigure


def bars_and_errors(
    labels: Sequence[str],
    before: Sequence[int],
    after: Sequence[int],
    errors: Sequence[float | None],
    unit: str,
) -> Figure:
    """Two bars for each label and, if there are any errors, a dot for each."""
    known = [(position, e) for position, e in enumerate(errors) if e is not None]
    ratios = [3, 1] if known else [1]
    figure = NotebookFigure(figsize=(9, 0.24 * max(len(labels), 4) + 1.6), layout="constrained")
    panels = figure.subplots(1, len(ratios), sharey=True, squeeze=False, width_ratios=ratios)[0]

    positions = range(len(labels))
    panels[0].barh(positions, before, height=0.8, color="#c9d3df", label="before")
    panels[0].barh(positions, after, height=0.4, color="#1f5fa8", label="after")
    panels[0].set_yticks(positions, labels, fontsize=8)
    panels[0].set_ylim(len(labels) - 0.4, -0.6)
    panels[0].set_xlabel(unit)
    panels[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    if known:
        panels[1].plot(
            [e for _, e in known], [position for position, _ in known], "o", color="#c05010"
        )
        panels[1].set_xlim(0, 1.1 * max(1.0, *(e for _, e in known)))
        panels[1].set_xlabel("weight error")
        panels[1].grid(axis="x", alpha=0.3)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    return figure
