"""The plan that the chains of a model follow now, whatever has been done since it was made."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from tdecomp.layers.chain import Chain
from tdecomp.layers.cost import chain_cost
from tdecomp.plans.plan import Plan, planned_row
from tdecomp.plans.row import Row


def plan_of(model: nn.Module, plan: Plan) -> Plan:
    """The plan, with a row for each chain that the model has beside those, as of an earlier step.

    A layer that is back in the place of its chain is left alone.
    """
    names: dict[Chain, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Chain) and module.replaced is not None:
            names.setdefault(module, []).append(name)
    chains = {its[0]: chain for chain, its in names.items()}
    gone = [row.name for row in plan if row.method is not None and row.name not in chains]
    plan = plan.without(dict.fromkeys(gone, "it is a layer again"))
    known = {row.name for row in plan if row.method is not None}
    others = [
        _row(names[chain], chain, plan) for name, chain in chains.items() if name not in known
    ]
    if not others:
        return plan
    of_stages = tuple(f"{row.name}." for row in others)
    replaced = {row.name for row in others}
    kept = [r for r in plan if r.name not in replaced and not r.name.startswith(of_stages)]
    methods = {c.method: c.decomposer for c in chains.values() if c.method is not None}
    return Plan(
        [*others, *kept], plan.everything_else, methods | {**plan.decomposers}, notes=plan.notes
    )


def _row(names: list[str], chain: Chain, plan: Plan) -> Row:
    """The row that a chain by itself tells of."""
    spec, method, rank = chain.replaced, chain.decomposer, chain.rank
    assert spec is not None
    assert rank is not None
    other = plan.decomposers.get(method.name)
    if other is not None and other.stages(spec, rank) != method.stages(spec, rank):
        raise ValueError(
            f"layer {names[0]!r}: {method.name!r} has other options there than elsewhere; expected "
            "one plan for the whole model: decompose the original in one step, or register the "
            "method under a name of its own"
        )
    params = chain_cost([spec], None).params
    return planned_row(Row(names[0], tuple(names), spec, params, params), method, rank)


def renamed(plan: Plan, new_name: Callable[[str], str | None]) -> Plan:
    """The plan for a model that has its layers under other names, or lacks some (None)."""

    def row_of(row: Row) -> Row | None:
        names = tuple(new for name in row.names if (new := new_name(name)) is not None)
        if not names:
            return None
        tied_to = None if row.tied_to is None else new_name(row.tied_to)
        options: dict[str, Any] = {} if tied_to else {"shares_all": False}
        return replace(row, name=names[0], names=names, tied_to=tied_to, **options)

    rows = [new for row in plan if (new := row_of(row)) is not None]
    return Plan(rows, plan.everything_else, plan.decomposers, notes=plan.notes)


def part_of(plan: Plan, path: str) -> Plan:
    """The plan of a model within the model, at this path."""
    if not path:
        return plan
    inner = f"{path}."
    return renamed(plan, lambda name: name.removeprefix(inner) if name.startswith(inner) else None)
