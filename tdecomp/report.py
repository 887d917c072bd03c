"""A layer's row, and the table of rows that people look at."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from tdecomp.chain import Rank
from tdecomp.cost import Cost, total
from tdecomp.latency.whole import Speed
from tdecomp.layer import Call, LayerSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Row:
    """What is to be done, or was done, with one layer.

    Attributes
    ----------
    name : str
        The first name it is reachable by; "" for the model itself.
    names : tuple of str
        All of them.
    layer : LayerSpec or None
        None where the sizes are not known (lazy and quantized layers).
    method : str or None
        None where the layer is left alone.
    rank : int, tuple of int or None
    reason : str or None
        Why it is left alone.
    note : str or None
        What else a reader should know, e.g. that a break-even went by parameters.
    params_before, params_after : int
    macs_before, macs_after : int or None
        Of one forward pass of the example inputs; None without them.
    expected_error : float or None
        Before anything is fitted: of ``output_error`` with data, of ``weight_error`` without. Exact
        for svd, lowrank and spatial, a bound for tucker2; None for CP unless a budget fitted it.
    weight_error : float or None
        ‖W − W̃‖ / ‖W‖ in the Frobenius norm, of the weights as they are stored.
    output_error : float or None
        The share of the output's variance that is lost, by the moments; None without data.
    latency_before, latency_after : float or None
        Measured seconds, of one pass of the example inputs, of the layer and of the chain alone,
        both in the layout of the result; None without a profile.
    fit_seconds : float or None
    component_norms : float or None
        For CP, the sum of the components' norms over the kernel's: far above √rank they cancel.
    calls : tuple of Call or None
        What the example inputs asked of the layer.
    """

    name: str
    names: tuple[str, ...]
    layer: LayerSpec | None
    params_before: int
    params_after: int
    macs_before: int | None = None
    macs_after: int | None = None
    method: str | None = None
    rank: Rank | None = None
    reason: str | None = None
    note: str | None = None
    expected_error: float | None = None
    weight_error: float | None = None
    output_error: float | None = None
    latency_before: float | None = None
    latency_after: float | None = None
    fit_seconds: float | None = None
    component_norms: float | None = None
    calls: tuple[Call, ...] | None = None

    @property
    def before(self) -> Cost:
        return Cost(self.params_before, self.macs_before, self.latency_before)

    @property
    def after(self) -> Cost:
        return Cost(self.params_after, self.macs_after, self.latency_after)

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data."""
        rank = list(self.rank) if isinstance(self.rank, tuple) else self.rank
        return {
            "name": self.name,
            "names": list(self.names),
            "layer": None if self.layer is None else self.layer.to_dict(),
            "method": self.method,
            "rank": rank,
            "reason": self.reason,
            "note": self.note,
            "params_before": self.params_before,
            "params_after": self.params_after,
            "macs_before": self.macs_before,
            "macs_after": self.macs_after,
            "expected_error": self.expected_error,
            "weight_error": self.weight_error,
            "output_error": self.output_error,
            "latency_before": self.latency_before,
            "latency_after": self.latency_after,
            "fit_seconds": self.fit_seconds,
            "component_norms": self.component_norms,
            "calls": None
            if self.calls is None
            else [[call.batch, list(call.size)] for call in self.calls],
        }


class Table:
    """Rows by name and in order, with the rest of the model as one more line.

    Attributes
    ----------
    rows : tuple of Row
    everything_else : Cost
        Parameters and MACs of all that is no row; the same before and after.
    speed : Speed or None
        The whole model's time against the original's, where it was measured.
    """

    title = "layers"

    def __init__(
        self, rows: Sequence[Row], everything_else: Cost, speed: Speed | None = None
    ) -> None:
        self.rows = tuple(rows)
        self.speed = speed
        self.everything_else = everything_else
        self._by_name = {name: row for row in self.rows for name in row.names}

    def __getitem__(self, name: str) -> Row:
        if name not in self._by_name:
            raise KeyError(f"no Linear or convolution is named {name!r}")
        return self._by_name[name]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @property
    def before(self) -> Cost:
        """Of the whole model as it was given."""
        return self.everything_else + total(row.before for row in self.rows)

    @property
    def after(self) -> Cost:
        """Of the whole model decomposed."""
        return self.everything_else + total(row.after for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The table as plain data."""
        return {
            "rows": [row.to_dict() for row in self.rows],
            "everything_else": _cost_dict(self.everything_else),
            "before": _cost_dict(self.before),
            "after": _cost_dict(self.after),
            "speed": None if self.speed is None else self.speed.to_dict(),
        }

    def to_json(self) -> str:
        """The table as JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def __str__(self) -> str:
        return f"{self._render('simple')}\n{self.summary()}"

    def __repr__(self) -> str:
        changed = sum(row.method is not None for row in self.rows)
        return f"<{type(self).__name__}: {changed} of {len(self.rows)} {self.title} decomposed>"

    def _repr_html_(self) -> str:
        return f"{self._render('html')}<p>{escape(self.summary())}</p>"

    def summary(self) -> str:
        """One line: how many layers, parameters and MACs."""
        changed = sum(row.method is not None for row in self.rows)
        words = f"{changed} of {len(self.rows)} layers decomposed"
        before, after = self.before, self.after
        words += f"; parameters {_change(before.params, after.params)}"
        if before.macs is not None and after.macs is not None:
            words += f"; MACs {_change(before.macs, after.macs)}"
        else:
            words += (
                "; without example_inputs: costs are parameters, and only attention layers of "
                "known classes were checked for weights that are read from outside"
            )
        return words if self.speed is None else f"{words}; {self.speed}"

    def plot(self) -> "Figure":
        """Each layer's MACs (parameters where none were observed) before and after, and its error.

        >>> result.report.plot().savefig("report.png")  # doctest: +SKIP

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        ImportError
            Without matplotlib, which the extra ``plot`` installs.
        """
        try:
            from tdecomp.plotting import bars_and_errors  # matplotlib is an extra
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install 'tdecomp[plot]'") from error
        by_macs = self.everything_else.macs is not None
        return bars_and_errors(
            labels=[row.name or "(model)" for row in self.rows],
            before=[(row.macs_before if by_macs else row.params_before) or 0 for row in self.rows],
            after=[(row.macs_after if by_macs else row.params_after) or 0 for row in self.rows],
            errors=[row.weight_error for row in self.rows],
            unit="MACs" if by_macs else "parameters",
        )

    def _render(self, style: str) -> str:
        headers = ["layer", "", "method", "rank", "params", "MACs", "ms", *_ERRORS, "notes"]
        body = [_cells(row) for row in self.rows]
        other, before, after = self.everything_else, self.before, self.after
        lines = (("everything else", other, other), ("total", before, after))
        blank = [""] * (len(_ERRORS) + 1)
        body += [[title, "", "", "", *_costs(was, now), *blank] for title, was, now in lines]
        shown = [i for i in range(len(headers)) if any(line[i] for line in body)]
        return str(
            tabulate(
                [[line[i] for i in shown] for line in body],
                headers=[headers[i] for i in shown],
                tablefmt=style,
                disable_numparse=True,
                colalign=["right" if headers[i] in _RIGHT else "left" for i in shown],
            )
        )


class Report(Table):
    """What `apply` did, layer by layer.

    Attributes
    ----------
    recovery : tuple of Recovery
        What the steps after it did to the error of the whole model.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        everything_else: Cost,
        recovery: Sequence[Any] = (),
        speed: Speed | None = None,
    ) -> None:
        super().__init__(rows, everything_else, speed)
        self.recovery = tuple(recovery)

    def summary(self) -> str:
        """One line: how many layers, parameters and MACs, and what was done afterwards."""
        return "; ".join((super().summary(), *map(str, self.recovery)))


_ERRORS = ("expected error", "weight error", "output error")
_RIGHT = {"params", "MACs", "ms", *_ERRORS}


def _cells(row: Row) -> list[str]:
    rank = "" if row.rank is None else str(row.rank)
    words = [row.reason or row.note or ""]
    if row.component_norms is not None:
        words.append(f"component norms {row.component_norms:.1f} times the kernel's")
    if len(row.names) > 1:
        words.append(f"also {', '.join(row.names[1:])}")
    return [
        row.name or "(model)",
        "" if row.layer is None else str(row.layer),
        row.method or "—",
        rank,
        *_costs(row.before, row.after),
        *(
            "" if error is None else f"{error:.4f}"
            for error in (row.expected_error, row.weight_error, row.output_error)
        ),
        "; ".join(word for word in words if word),
    ]


def _costs(before: Cost, after: Cost) -> tuple[str, str, str]:
    return (
        _arrow(before.params, after.params),
        _arrow(before.macs, after.macs),
        _milliseconds(before.latency, after.latency),
    )


def _milliseconds(before: float | None, after: float | None) -> str:
    words = ["" if seconds is None else f"{1e3 * seconds:.3g}" for seconds in (before, after)]
    return words[0] if before == after else " → ".join(word for word in words if word)


def _arrow(before: int | None, after: int | None) -> str:
    if before is None or after is None or before == after:
        return _count(before)
    return f"{_count(before)} → {_count(after)}"


def _change(before: int, after: int) -> str:
    share = f" ({after / before:.3f})" if before else ""
    return f"{_count(before)} → {_count(after)}{share}"


def _count(value: int | None) -> str:
    """Three significant digits and a metric prefix."""
    if value is None:
        return ""
    amount, prefix = float(value), ""
    for larger in ("k", "M", "G", "T"):
        if abs(amount) < 999.5:
            break
        amount, prefix = amount / 1000, larger
    digits = 0 if not prefix else max(0, 2 - len(str(int(abs(amount)))) + 1)
    return f"{amount:.{digits}f}{prefix}"


def _cost_dict(cost: Cost) -> dict[str, float | None]:
    return {"params": cost.params, "macs": cost.macs, "latency": cost.latency}


def cost_from_dict(data: dict[str, Any]) -> Cost:
    """The inverse of a cost's plain data."""
    return Cost(data["params"], data["macs"], data.get("latency"))


def calls_from_list(data: Sequence[Any] | None) -> tuple[Call, ...] | None:
    """The inverse of a row's plain calls."""
    return None if data is None else tuple(Call(batch, tuple(size)) for batch, size in data)
