"""Rows as the table that people look at."""

import difflib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import TYPE_CHECKING, Any

from tdecomp.decomposers.base import Decomposer
from tdecomp.files.whole_file import whole_file
from tdecomp.layers.cost import Cost, count_in_words, total
from tdecomp.loss_curves.columns import filled_columns
from tdecomp.pictures.chain import drawn_chain
from tdecomp.pictures.drawing import Drawing
from tdecomp.pictures.page import Page
from tdecomp.pictures.style import largest, needs_matplotlib
from tdecomp.plans.data_notes import WARNING
from tdecomp.plans.left_alone import largest_left_alone
from tdecomp.plans.page_columns import page_columns
from tdecomp.plans.row import Row
from tdecomp.timing.speed import Speed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Of plans, reports and files; 1 was that of tdecomp 0.1.
FORMAT = 2
_DRAWN = 40  # chains on a page; of more layers, those of the largest cost


class Table:
    """Rows by name and in order, with the rest of the model as one more line.

    Attributes
    ----------
    rows : tuple of Row
    everything_else : Cost
        Parameters and MACs of all that is no row; the same before and after.
    speed : Speed or None
        The whole model's time against the original's, where it was measured.
    notes : tuple of str
        What the summary says of the data.
    decomposers : mapping of str to Decomposer
        The methods that the rows name, with their options.
    """

    title = "layers"

    def __init__(
        self,
        rows: Sequence[Row],
        everything_else: Cost,
        decomposers: Mapping[str, Decomposer],
        speed: Speed | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.rows = tuple(rows)
        self.notes = tuple(notes)
        self.speed = speed
        used = {row.method for row in rows}
        self.decomposers = {name: d for name, d in decomposers.items() if name in used}
        self.everything_else = everything_else
        self._by_name = {name: row for row in self.rows for name in row.names}

    def __getitem__(self, name: str) -> Row:
        if name not in self._by_name:
            near = difflib.get_close_matches(name, self._by_name) or [*self._by_name][:3]
            there = f"of {len(self)} there are {', '.join(map(repr, near))}"
            raise KeyError(f"no Linear or convolution is named {name!r}; {there}")
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
            "format": FORMAT,
            "rows": [row.to_dict() for row in self.rows],
            "everything_else": asdict(self.everything_else),
            "before": asdict(self.before),
            "after": asdict(self.after),
            "speed": None if self.speed is None else self.speed.to_dict(),
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """The table as JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def __str__(self) -> str:
        return "\n".join([*self.warnings, self._render("simple"), *self._below()])

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._changed()} of {len(self)} {self.title} decomposed>"

    def _changed(self) -> int:
        return sum(row.method is not None for row in self.rows)

    def _repr_html_(self) -> str:
        above, below = (
            [f"<p>{escape(line)}</p>" for line in lines] for lines in (self.warnings, self._below())
        )
        return "".join([*above, self._render("html"), *below])

    def _below(self) -> list[str]:
        """The lines below the table."""
        return [*self._left_alone(), "; ".join(self._facts())]

    def summary(self) -> str:
        """One line: warnings, how many layers, parameters and MACs, and what else was found."""
        return "; ".join([*self.warnings, *self._facts()])

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to know before looking at the rest."""
        found = () if self.speed is None else self.speed.shortfalls
        notes = [note for note in self.notes if note.startswith(WARNING)]
        return (*(WARNING + words for words in found), *notes)

    def _left_alone(self) -> list[str]:
        """The largest layers that are left alone; their rows say why."""
        rows, whole = [row for row in self.rows if row.method is None], self.before
        found = [(row.before, row.name or "(model)", "") for row in rows]  # its notes say why
        unit = "macs" if whole.macs else "params"
        words = largest_left_alone(found, whole, unit)
        return [f"left alone: {len(rows)}, {words}"] if words else []

    def _facts(self) -> list[str]:
        before, after = self.before, self.after
        macs = (
            "without example_inputs: costs are parameters, and without data, too, it was not "
            "tried whether the model runs with its chains"
        )
        if before.macs is not None and after.macs is not None:
            macs = f"MACs {_change(before.macs, after.macs)}"
            if before.uncounted:
                remedy = "torch.utils.flop_counter.register_flop_formula takes their formulas"
                macs += f" without those of {before.uncounted} ({remedy})"
        changed = f"{self._changed()} of {len(self)} layers decomposed"
        words = [changed, f"parameters {_change(before.params, after.params)}", macs]
        notes = [note for note in self.notes if not note.startswith(WARNING)]
        return [*words, *([] if self.speed is None else [str(self.speed)]), *notes]

    def draw(self, name: str) -> Drawing:
        """The layer of this name above the chain in its place, with the costs of its calls.

        >>> result.report.draw("features.3").save("features-3.svg")  # doctest: +SKIP

        A KeyError is raised if no layer has that name, a ValueError if it is left alone.
        """
        row = self[name]
        if row.layer is None or row.method is None or row.rank is None:
            raise ValueError(f"draw: layer {name!r} is left alone ({row.reason}): it has no chain")
        method = self.decomposers[row.method]
        return drawn_chain(row.layer, row.calls, method, row.rank, name or "(model)")

    def plot(self) -> "Figure":
        """Each layer's MACs (parameters where none were observed) before and after, and its error.

        >>> result.report.plot().savefig("report.png")  # doctest: +SKIP

        An ImportError is raised without matplotlib, which the extra ``plot`` installs.
        """
        with needs_matplotlib("plot()"):
            from tdecomp.pictures.costs import LayerBars, costs_and_errors
        counted = self.everything_else.macs is not None
        layers = []
        for row in self.rows:
            cost: tuple[int, int] = row.params_before, row.params_after
            if counted:
                cost = row.macs_before or 0, row.macs_after or 0
            seconds = None
            if row.latency_before is not None and row.latency_after is not None:
                seconds = row.latency_before, row.latency_after
            layers.append(
                LayerBars(row.name or "(model)", row.method, cost, seconds, _errors_of(row))
            )
        return costs_and_errors(layers, "MACs" if counted else "parameters")

    def to_html(self, file: str | os.PathLike[str]) -> None:
        """Write one page that can be sent to somebody: warnings, totals, pictures, chains.

        >>> result.report.to_html("report.html")  # doctest: +SKIP

        It fetches nothing; a click on a column's head sorts the table. Without matplotlib, which
        the extra ``plot`` installs, the picture of costs is left out, and the page says so.
        """
        try:
            with needs_matplotlib("the picture of costs and errors"):
                from tdecomp.pictures.figure import as_svg
            picture = as_svg(self.plot()), f"Costs and errors of {len(self)} layers"
        except ImportError as error:
            picture = "", str(error)
        changed = [row for row in self.rows if row.method is not None]
        drawn = largest(changed, lambda row: row.before.amount, _DRAWN)
        rest, whole = (self.everything_else,) * 2, (self.before, self.after)
        page = Page(
            repr(self)[1:-1],
            self.warnings,
            [*self._facts(), *self._left_alone()],
            picture,
            page_columns(self.rows, rest, whole),
            [self.draw(row.name) for row in drawn],
        )
        with whole_file(file) as draft:
            draft.write_text(page.html(), encoding="utf-8")

    def _render(self, style: str) -> str:
        numbers, rest = ("params", "MACs", "ms", *_ERRORS), self.everything_else
        headers = ["layer", "", "method", "rank", *numbers, "notes"]
        blank = [""] * (len(_ERRORS) + 1)
        sums = {"everything else": _costs(rest, rest), "total": _costs(self.before, self.after)}
        body = [[title, "", "", "", *costs, *blank] for title, costs in sums.items()]
        return filled_columns(headers, [*map(_cells, self.rows), *body], right=numbers, style=style)


_ERRORS = ("expected error", "weight error", "output error")


def _errors_of(row: Row) -> dict[str, tuple[float, float]]:
    """What is known of the row's errors, with their margins; an expectation until it was fitted."""
    known = {"weight error": row.weight_error, "output error": row.output_error}
    if row.weight_error is None:
        known["expected error"] = row.expected_error
    margins = {"output error": row.output_error_margin or 0.0}
    return {name: (e, margins.get(name, 0.0)) for name, e in known.items() if e is not None}


def _cells(row: Row) -> list[str]:
    errors = [
        "" if error is None else f"{error:.4f}"
        for error in (row.expected_error, row.weight_error, row.output_error)
    ]
    if row.output_error_margin is not None:
        errors[-1] += f" ± {row.output_error_margin:.4f}"
    return [
        row.name or "(model)",
        "" if row.layer is None else str(row.layer),
        row.method or "—",
        "" if row.rank is None else str(row.rank),
        *_costs(row.before, row.after),
        *errors,
        row.remarks,
    ]


def _costs(before: Cost, after: Cost) -> list[str]:
    """Parameters, MACs and milliseconds before and after; once where they are equal."""

    def cell(name: str, in_words: Callable[[float], str]) -> str:
        both = dict.fromkeys((getattr(before, name), getattr(after, name)))
        return " → ".join(in_words(value) for value in both if value is not None)

    milliseconds = cell("latency", lambda seconds: f"{1e3 * seconds:.3g}")
    return [cell("params", count_in_words), cell("macs", count_in_words), milliseconds]


def _change(before: int, after: int) -> str:
    share = f" ({after / before:.3f})" if before else ""
    return f"{count_in_words(before)} → {count_in_words(after)}{share}"
