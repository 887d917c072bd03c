"""A comparison as text."""

from collections.abc import Sequence

from tabulate import tabulate

from benchmarks.support.comparison import Measurement
from benchmarks.support.timing import Latency

MISSING = "–"


def format_table(measurements: Sequence[Measurement], *, finetune: int) -> str:
    """One line for each network; columns without any value are left out."""
    columns = {
        "method": [m.title for m in measurements],
        "rank": [m.rank or MISSING for m in measurements],
        "layers\nchanged": [_layers(m) for m in measurements],
        "ranks": [m.ranks or MISSING for m in measurements],
        "svd ranks\n(Linear)": [m.linear_ranks or MISSING for m in measurements],
        "params": [_amount(m.params, m.params_ratio) for m in measurements],
        "MACs": [_amount(m.macs, m.macs_ratio) for m in measurements],
        "latency": [_latency(m.latency) for m in measurements],
        "fit (s)": [_number(m.decompose_seconds, ".2f") for m in measurements],
        "weight\nerror": [_number(m.weight_error, ".3f") for m in measurements],
        "output\nerror": [_number(m.output_error, ".3f") for m in measurements],
        "accuracy\n(%)": [_percent(m.accuracy_before) for m in measurements],
        f"after {finetune}\nsteps (%)": [_percent(m.accuracy_after) for m in measurements],
    }
    shown = {title: cells for title, cells in columns.items() if set(cells) != {MISSING}}
    right = {"params", "MACs", "latency"}
    alignment = ["right" if title in right or "(" in title else "left" for title in shown]
    return tabulate(shown, headers="keys", colalign=alignment, disable_numparse=True)


def _layers(m: Measurement) -> str:
    return MISSING if m.layers_changed is None else f"{m.layers_changed} of {m.layers_total}"


def _amount(value: int, ratio: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit} ({ratio:.2f}×)"
    return f"{value} ({ratio:.2f}×)"


def _latency(latency: Latency | None) -> str:
    if latency is None:
        return MISSING
    return f"{latency.median * 1e3:.1f} ms ({latency.ratio:.2f}×)"


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2%}".removesuffix("%")
