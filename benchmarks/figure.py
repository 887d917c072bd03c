"""A comparison as a picture: accuracy against MACs and against measured latency."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from benchmarks.comparison import Measurement

# Okabe & Ito's colours, which stay apart for the colour-blind; black is the original's.
COLOURS = ("#0072b2", "#56b4e9", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
MARKERS = ("o", "s", "D", "^", "v", "P")


@dataclass(frozen=True)
class Style:
    colour: str
    marker: str


def draw_comparison(
    measurements: Sequence[Measurement], path: Path, *, title: str, finetune: int
) -> None:
    """Write a PNG; without accuracies it shows latency against MACs."""
    styles = _styles(measurements)
    with_accuracy = measurements[0].accuracy_before is not None
    figure = Figure(figsize=(10, 4.6) if with_accuracy else (6, 4.6), layout="constrained")
    if with_accuracy:
        left, right = figure.subplots(1, 2, sharey=True)
        for m in measurements:
            _draw_accuracy(left, m, m.macs_ratio, None, styles[m.label])
            assert m.latency is not None  # noqa: S101
            _draw_accuracy(right, m, m.latency.ratio, m.latency.ratio_quartiles, styles[m.label])
        left.set_ylabel("accuracy")
        left.yaxis.set_major_formatter(PercentFormatter(1.0))
        _finish(left, "MACs, of the original's")
        _finish(right, "measured latency, of the original's")
    else:
        axes = figure.subplots()
        for m in measurements:
            _draw_latency(axes, m, styles[m.label])
        axes.set_ylabel("measured latency, of the original's")
        axes.set_ylim(bottom=0)
        _finish(axes, "MACs, of the original's")
    handles = _legend(styles, explain=with_accuracy and finetune > 0, finetune=finetune)
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _styles(measurements: Sequence[Measurement]) -> dict[str, Style]:
    """One colour and marker for each label, black for the original."""
    styles = {measurements[0].label: Style("black", "*")}
    for i, m in enumerate(measurements[1:]):
        styles[m.label] = Style(
            COLOURS[i % len(COLOURS)], MARKERS[(i // len(COLOURS) + i) % len(MARKERS)]
        )
    return styles


def _draw_accuracy(
    axes: Axes, m: Measurement, x: float, spread: tuple[float, float] | None, style: Style
) -> None:
    """A hollow marker before fine-tuning, a full one after it, and a line between them."""
    assert m.accuracy_before is not None  # noqa: S101
    size = 11 if style.marker == "*" else 7
    last = m.accuracy_before if m.accuracy_after is None else m.accuracy_after
    if spread is not None:
        axes.plot(spread, (last, last), color=style.colour, lw=1.5, alpha=0.6)
    axes.plot((x, x), (m.accuracy_before, last), color=style.colour, lw=1, ls=":", zorder=1)
    axes.plot(x, m.accuracy_before, style.marker, ms=size, mec=style.colour, mfc="white")
    if m.accuracy_after is not None:
        axes.plot(x, last, style.marker, ms=size, color=style.colour)


def _draw_latency(axes: Axes, m: Measurement, style: Style) -> None:
    assert m.latency is not None  # noqa: S101
    axes.plot((m.macs_ratio, m.macs_ratio), m.latency.ratio_quartiles, color=style.colour, lw=1.5)
    axes.plot(m.macs_ratio, m.latency.ratio, style.marker, ms=8, color=style.colour)


def _finish(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.set_xlim(0, max(1.1, axes.get_xlim()[1]))
    axes.axvline(1.0, color="grey", lw=0.8, ls="--", zorder=0)
    axes.grid(alpha=0.3, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(styles: dict[str, Style], *, explain: bool, finetune: int) -> list[Line2D]:
    entry: Callable[..., Line2D] = lambda marker, colour, **more: Line2D(  # noqa: E731
        [], [], ls="", marker=marker, color=colour, **more
    )
    handles = [entry(s.marker, s.colour, ms=7, label=label) for label, s in styles.items()]
    if explain:
        handles += [
            entry("o", "grey", mfc="white", label="before fine-tuning"),
            entry("o", "grey", label=f"after {finetune} steps"),
        ]
    return handles
