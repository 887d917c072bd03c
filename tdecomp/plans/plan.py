"""A plan: which layer gets which method and rank, as plain data."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any

from torch import nn

from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.registry import get_decomposer
from tdecomp.layers.cost import Cost, chain_cost
from tdecomp.layers.spec import LayerSpec
from tdecomp.model.sites import Site, find_sites
from tdecomp.plans.row import Row, calls_from_list, cost_from_dict
from tdecomp.plans.table import Table
from tdecomp.ranks.base import spread
from tdecomp.timing.speed import Speed

_FORMAT = 1


class Plan(Table):
    """Which layer gets which method and rank. Plain data: print it, edit it, save it, apply it.

    >>> plan = tdecomp.plan(model, "svd", rank=8)              # doctest: +SKIP
    >>> plan = plan.edit("fc1", rank=4)                        # doctest: +SKIP
    >>> tdecomp.apply(model, Plan.from_json(plan.to_json()))   # doctest: +SKIP

    Attributes
    ----------
    rows : tuple of Row
    everything_else : Cost
    decomposers : mapping of str to Decomposer
        The methods that the rows name, with their options.
    speed : Speed or None
        With a profile, how long the whole model took with chains like these.
    """

    title = "layers to be"

    def __init__(
        self,
        rows: Sequence[Row],
        everything_else: Cost,
        decomposers: Mapping[str, Decomposer],
        speed: Speed | None = None,
    ) -> None:
        super().__init__(rows, everything_else, speed)
        used = {row.method for row in rows}
        self.decomposers = {name: d for name, d in decomposers.items() if name in used}

    def edit(
        self, name: str, *, method: str | Decomposer | None = None, rank: Any = None
    ) -> "Plan":
        """A new plan with another method or rank for one layer; its costs are counted anew.

        Parameters
        ----------
        name : str
        method : str or Decomposer, optional
            As it is planned already, if left out.
        rank : int or tuple of int, optional
            As it is planned already, if left out.

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
        decomposer = (
            self.decomposers[chosen]
            if isinstance(chosen, str) and chosen in self.decomposers
            else get_decomposer(chosen)
        )
        others = any(old.method == decomposer.name for old in self.rows if old is not row)
        if others and self.decomposers.get(decomposer.name, decomposer) != decomposer:
            raise ValueError(
                f"layer {name!r}: other layers are planned with {decomposer.name!r} and other "
                "options; register this one under a name of its own"
            )
        edited = planned_row(
            replace(row, note=None, expected_error=None, latency_after=None),
            decomposer,
            row.rank if rank is None else rank,
        )
        rows = [edited if old is row else old for old in self.rows]
        speed = None if self.speed is None else replace(self.speed, predicted=None, measured=None)
        named = {**self.decomposers, decomposer.name: decomposer}
        return Plan(rows, self.everything_else, named, speed)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, with the options of its methods."""
        options = {name: _options(d) for name, d in self.decomposers.items()}
        return {"format": _FORMAT, "methods": options, **super().to_dict()}

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Bring back a plan from `to_json`, edited or not; costs are counted anew.

        Raises
        ------
        ValueError
            If it is no plan, of a newer format, or has a method or a rank that cannot be.
        """
        try:
            data = json.loads(text)
            if data["format"] != _FORMAT:
                raise ValueError(
                    f"plan format {data['format']!r}: this version reads format {_FORMAT}"
                )
            decomposers = {
                name: _with_options(name, options) for name, options in data["methods"].items()
            }
            for name in {row["method"] for row in data["rows"]} - {None, *decomposers}:
                decomposers[name] = get_decomposer(name)
            rows = [_row_from_dict(row, decomposers) for row in data["rows"]]
            if len({row.name for row in rows}) < len(rows):
                raise TypeError("a layer has two rows")
            speed = None if data.get("speed") is None else Speed.from_dict(data["speed"])
            return cls(rows, cost_from_dict(data["everything_else"]), decomposers, speed)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a plan's JSON: {type(error).__name__}: {error}") from error


def match_sites(model: nn.Module, plan: Plan) -> dict[str, Site]:
    """The model's sites by name, each checked to be what the plan's row was planned for.

    Raises
    ------
    ValueError
        If the model lacks a layer of the plan, has another in its place, or cannot spare it.
    """
    sites = dict(find_sites(model))
    for row in plan:
        site = sites.get(row.name)
        if site is None:
            raise ValueError(
                f"layer {row.name!r}: the plan has it, the model has no such Linear or "
                "convolution; expected a model of the architecture that was planned for"
            )
        if site.names != row.names:
            raise ValueError(
                f"layer {row.name!r}: got the names {site.names}, but the plan expects "
                f"{row.names}; plan anew for this model"
            )
        if site.spec != row.layer:
            raise ValueError(
                f"layer {row.name!r}: got {site.spec}, but the plan expects {row.layer}; plan "
                "anew for this model"
            )
        if row.method is not None and site.reason is not None:
            raise ValueError(f"layer {row.name!r} cannot be replaced: {site.reason}")
    for name in sites.keys() - {row.name for row in plan}:
        raise ValueError(
            f"layer {name!r}: the model has it, the plan does not; expected a model of the "
            "architecture that was planned for"
        )
    return sites


def planned_row(row: Row, decomposer: Decomposer, rank: Any) -> Row:
    """The row with this method and rank, and what they cost.

    Raises
    ------
    ValueError
        If the method cannot take the layer, or not at that rank.
    """
    if row.layer is None:
        raise ValueError(f"layer {row.name!r} cannot be decomposed: {row.reason}")
    refusal = decomposer.refusal(row.layer)
    if refusal is not None:
        raise ValueError(f"layer {row.name!r} ({row.layer}): {refusal}")
    listed = tuple(rank) if isinstance(rank, list) else rank  # as JSON has pairs
    rank = spread(listed, decomposer.max_rank(row.layer))
    try:
        decomposer.check_rank(rank, row.layer)
    except ValueError as error:
        raise ValueError(f"layer {row.name!r}: {error}") from error
    after = chain_cost(decomposer.stages(row.layer, rank), row.calls)
    return replace(
        row,
        method=decomposer.name,
        rank=rank,
        reason=None,
        params_after=after.params,
        macs_after=after.macs,
    )


def _options(decomposer: Decomposer) -> dict[str, Any]:
    return asdict(decomposer) if is_dataclass(decomposer) else {}


def _with_options(name: str, options: dict[str, Any]) -> Decomposer:
    decomposer = get_decomposer(name)
    if not is_dataclass(decomposer) or not options:
        return decomposer
    unknown = set(options) - {f.name for f in fields(decomposer)}
    if unknown:
        raise ValueError(f"plan: {name!r} has no option {', '.join(map(repr, sorted(unknown)))}")
    return replace(decomposer, **options)


def _row_from_dict(data: dict[str, Any], decomposers: Mapping[str, Decomposer]) -> Row:
    layer = None if data["layer"] is None else LayerSpec.from_dict(data["layer"])
    counts = (data["params_before"], data["macs_before"] or 0)
    if not isinstance(data["name"], str) or not all(isinstance(n, int) for n in counts):
        raise TypeError(f"expected a name and whole counts, got {data['name']!r} and {counts}")
    row = Row(
        data["name"],
        tuple(data["names"]),
        layer,
        params_before=data["params_before"],
        params_after=data["params_before"],
        macs_before=data["macs_before"],
        macs_after=data["macs_before"],
        reason=data["reason"],
        note=data["note"],
        expected_error=data.get("expected_error"),
        latency_before=data.get("latency_before"),
        latency_after=data.get("latency_after"),
        calls=calls_from_list(data["calls"]),
    )
    if data["method"] is None:
        return row
    planned = planned_row(row, decomposers[data["method"]], data["rank"])
    if (planned.params_after, planned.macs_after) == (data["params_after"], data["macs_after"]):
        return planned
    return replace(planned, expected_error=None, latency_after=None)  # edited: nobody expected it
