"""A plan: which layer gets which method and rank, as plain data."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.registry import get_decomposer, registered
from tdecomp.decomposers.tied import own_params
from tdecomp.files.typed import parsed, typed
from tdecomp.files.whole_file import named_in_errors
from tdecomp.layers.cost import Cost, chain_cost
from tdecomp.model.sites import Site
from tdecomp.plans.expected_loss import ExpectedLoss
from tdecomp.plans.row import Row
from tdecomp.plans.table import FORMAT, Table
from tdecomp.ranks.base import checked_rank
from tdecomp.timing.speed import Speed


class Plan(Table):
    """Which layer gets which method and rank. Plain data: print it, edit it, save it, apply it.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    >>> plan = tdecomp.plan(model, "svd", rank=8, progress=False).edit("2", rank=4)
    >>> Plan.from_json(plan.to_json())["2"].rank
    4

    Attributes
    ----------
    rows : tuple of Row
        One for each weight of two or more dimensions.
    everything_else : Cost
        Parameters and MACs of all that is no row; the same before and after.
    decomposers : mapping of str to Decomposer
        The methods that the rows name, with their options.
    speed : Speed or None
        With a profile, the time of the whole model with such chains.
    loss : ExpectedLoss or None
        With a `Budget`, the sum that it makes small, beside a lower bound.
    notes : tuple of str
        What the summary says of the data.
    """

    title = "layers to be"

    def __init__(
        self,
        rows: Sequence[Row],
        everything_else: Cost,
        decomposers: Mapping[str, Decomposer],
        speed: Speed | None = None,
        loss: ExpectedLoss | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__(rows, everything_else, decomposers, speed, notes)
        self.loss = loss

    def edit(
        self, name: str, *, method: str | Decomposer | None = None, rank: Any = None
    ) -> "Plan":
        """A new plan with another method or rank for one layer; its costs are counted anew.

        Layers that share their factors with it are planned alike.

        Parameters
        ----------
        name : str
            Of the layer.
        method : str or Decomposer, optional
            By default the one that is planned already.
        rank : int or tuple of int, optional
            By default what is planned already.

        Raises
        ------
        KeyError
            If no layer has that name.
        ValueError
            If the method cannot take the layer, or not at that rank.
        """
        row = self[name]
        chosen = method or row.method
        if chosen is None:
            raise ValueError(f"layer {name!r} is left alone ({row.reason}): name a method for it")
        known = self.decomposers.get(chosen) if isinstance(chosen, str) else None
        decomposer = known or get_decomposer(chosen)
        group = [old for old in self.rows if _tied(old) == _tied(row)]
        others = {old.method for old in self.rows if old not in group}
        planned = self.decomposers.get(decomposer.name, decomposer)
        if decomposer.name in others and planned != decomposer:
            raise ValueError(
                f"layer {name!r}: other layers are planned with {decomposer.name!r} and other "
                "options; register this one under a name of its own"
            )
        edited = {
            old.name: planned_row(
                replace(old, note=None, expected_error=None, latency_after=None),
                decomposer,
                row.rank if rank is None else rank,
            )
            for old in group
        }
        rows = [edited.get(old.name, old) for old in self.rows]
        speed = None if self.speed is None else replace(self.speed, predicted=None, measured=None)
        named = {**self.decomposers, decomposer.name: decomposer}
        return Plan(rows, self.everything_else, named, speed, notes=self.notes)

    def without(self, reasons: Mapping[str, str]) -> "Plan":
        """A new plan that leaves these layers alone, for the reasons given by their names."""
        if not reasons:
            return self
        tied = {_tied(r): r.name for r in self.rows if r.name in reasons}
        words = "its weight is tied to that of {!r}, which is left alone"
        found = {r.name: words.format(tied[_tied(r)]) for r in self.rows if _tied(r) in tied}
        found |= reasons
        rows = [_left_alone(r, found[r.name]) if r.name in found else r for r in self.rows]
        speed = None if self.speed is None else replace(self.speed, predicted=None, measured=None)
        return Plan(rows, self.everything_else, self.decomposers, speed, notes=self.notes)

    def _facts(self) -> list[str]:
        return [*super()._facts(), *([str(self.loss)] if self.loss else [])]

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, with the options of its methods.

        A ValueError names a method that cannot be rebuilt from its options.
        """
        options = {name: options_of(d) for name, d in self.decomposers.items()}
        loss = None if self.loss is None else self.loss.to_dict()
        return {"methods": options, **super().to_dict(), "loss": loss}

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Bring back a plan from `to_json`, edited or not; costs are counted anew.

        A ValueError refuses a text that is no plan or one of another format, and a method or a
        rank that cannot be.
        """
        with named_in_errors("plan"):
            return cls.from_dict(parsed(text, "plan", FORMAT))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Plan":
        """The inverse of `to_dict`, as `from_json`; an entry of a wrong type is a TypeError."""
        options = typed(dict[str, dict[str, Any]], data.get("methods"), "methods")
        rows = typed(tuple[Row, ...], data.get("rows"), "rows")
        methods = {name: _with_options(name, known) for name, known in options.items()}
        methods |= {row.method: get_decomposer(row.method) for row in rows
                    if row.method not in {None, *methods}}  # fmt: skip
        names = [name for row in rows for name in row.names]
        if len({*names}) < len(names):
            raise ValueError(f"expected one row for each layer, got the names {names}")
        _check_ties(rows)
        counted = [_counted_anew(row, methods) for row in rows]
        loss = typed(ExpectedLoss | None, data.get("loss"), "loss")
        if any(a.after != b.after for a, b in zip(rows, counted, strict=True)):
            loss = None  # it was that of other choices
        return cls(
            counted,
            typed(Cost, data.get("everything_else"), "everything_else"),
            methods,
            typed(Speed | None, data.get("speed"), "speed"),
            loss,
            typed(tuple[str, ...], data.get("notes", ()), "notes"),
        )


_EXPECTED = "expected a model of the architecture that was planned for"


def match_sites(sites: Mapping[str, Site], plan: Plan) -> dict[str, Site]:
    """The model's sites by name, each checked to be the layer that the plan's row was made for."""
    found = dict(sites)
    _check_ties(plan.rows)
    for row in plan:
        site = found.get(row.name)
        if site is None:
            raise ValueError(
                f"layer {row.name!r}: the plan has it, the model has no such layer; {_EXPECTED}"
            )
        pairs = ((f"the names {site.names}", f"the names {row.names}"), (site.spec, row.layer))
        for got, expected in pairs:
            # What was of no known kind when the plan was made may have become one since.
            if got != expected and not (expected is None and row.method is None):
                raise ValueError(
                    f"layer {row.name!r}: got {got}, but the plan expects {expected}; plan anew "
                    "for this model"
                )
        if row.method is not None and site.reason is not None:
            raise ValueError(f"layer {row.name!r} cannot be replaced: {site.reason}")
        first = site.tied[0] if site.tied and not site.reason else row.name
        if row.method is not None and _tied(row) != first:
            words = [_tied_to(other, row.name) for other in (first, _tied(row))]
            raise ValueError(
                f"layer {row.name!r}: its weight is {words[0]} in the model, {words[1]} in the "
                "plan; plan anew for this model"
            )
    for name in found.keys() - {row.name for row in plan}:
        raise ValueError(f"layer {name!r}: the model has it, the plan does not; {_EXPECTED}")
    return found


def _tied(row: Row) -> str:
    """The first row of those that share factors with this one, or itself."""
    return row.tied_to or row.name


def _check_ties(rows: Sequence[Row]) -> None:
    """Refuse layers that are to share their factors and are planned differently."""
    known = {row.name: row for row in rows}
    for row in rows:
        first = known.get(_tied(row))
        if first is None:
            raise ValueError(f"layer {row.name!r}: tied to {row.tied_to!r}, which has no row")
        if (row.method, row.rank) != (first.method, first.rank):
            mine, its = (f"{r.method} at rank {r.rank}" if r.method else "left alone"
                         for r in (row, first))  # fmt: skip
            raise ValueError(
                f"layer {row.name!r}: planned {mine}, and {first.name!r}, which has the same "
                f"weight, {its}; expected one choice for both: Plan.edit changes them together"
            )


def planned_row(row: Row, decomposer: Decomposer, rank: Any) -> Row:
    """The row with this method and rank and their costs; a ValueError where they cannot be."""
    if row.layer is None:
        raise ValueError(f"layer {row.name!r} cannot be decomposed: {row.reason}")
    rank = checked_rank(f"layer {row.name!r}", decomposer, row.layer, rank)
    cost = chain_cost(decomposer.stages(row.layer, rank), row.calls)
    params = cost.params
    if row.tied_to is not None:
        params = own_params(decomposer, row.layer, rank, alike=row.shares_all)
    row = replace(row, method=decomposer.name, rank=rank, reason=None)
    return replace(row, params_after=params, macs_after=cost.macs)


def _left_alone(row: Row, reason: str) -> Row:
    return replace(
        row, method=None, rank=None, reason=reason, note=None, expected_error=None,
        params_after=row.params_before, macs_after=row.macs_before,
        latency_after=row.latency_before,
    )  # fmt: skip


def _counted_anew(row: Row, decomposers: Mapping[str, Decomposer]) -> Row:
    """A row that was read, with its own costs; a row that was edited has no expectations."""
    if row.method is None:
        return replace(row, params_after=row.params_before, macs_after=row.macs_before)
    planned = planned_row(row, decomposers[row.method], row.rank)
    if (planned.params_after, planned.macs_after) == (row.params_after, row.macs_after):
        return planned
    return replace(planned, expected_error=None, latency_after=None)


def options_of(decomposer: Decomposer) -> dict[str, Any]:
    """The options that make the method again, as plain data; a ValueError if they do not."""
    name, kind = decomposer.name, type(decomposer)
    options: dict[str, Any] = {}
    rebuilt = get_decomposer(name) if name in registered() else None
    problem = f"{kind.__name__} is no dataclass and not registered as it is"
    try:
        if rebuilt is not None and type(rebuilt).__qualname__ != kind.__qualname__:
            problem = f"{type(rebuilt).__name__} is registered under it; use a name of its own"
            rebuilt = None
        elif is_dataclass(decomposer):
            options = {f.name: getattr(decomposer, f.name) for f in fields(decomposer) if f.init}
            problem = "the method that comes back holds something else"
            rebuilt = kind(**_read(json.loads(json.dumps(options))))
        if rebuilt is not None and vars(rebuilt) == vars(decomposer):
            return options
    except (TypeError, ValueError, RuntimeError) as error:  # arrays do not compare to one answer
        problem += f" ({error})"
    raise ValueError(
        f"method {name!r} cannot be rebuilt from its options {options}: {problem}; expected a "
        "frozen dataclass whose fields hold numbers, strings or tuples of them"
    )


def _read(options: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}


def _with_options(name: str, options: dict[str, Any]) -> Decomposer:
    decomposer = get_decomposer(name)
    known = {f.name for f in fields(decomposer)} if is_dataclass(decomposer) else set[str]()
    if unknown := options.keys() - known:
        raise ValueError(f"{name!r} has no option {', '.join(map(repr, sorted(unknown)))}")
    return replace(decomposer, **_read(options)) if options else decomposer  # type: ignore[type-var]


def _tied_to(first: str, name: str) -> str:
    return "its own" if first == name else f"tied to that of {first!r}"
