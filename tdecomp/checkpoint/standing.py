"""The plan that the chains of a model follow now, and that of a part of the model."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from tdecomp.decomposers.base import Decomposer
from tdecomp.layers.chain import Chain
from tdecomp.layers.cost import Cost, chain_cost
from tdecomp.plans.plan import Plan, planned_row
from tdecomp.plans.row import Row


def plan_of(model: nn.Module, plan: Plan) -> Plan:
    """The plan, without the layers that are back in the places of their chains, `with_earlier`."""
    chains = chains_in(model)
    planned = {row.name for row in plan if row.method is not None}
    whole, standing = planned - chains.keys(), planned & chains.keys()
    return with_earlier(model, _layers_again(plan, whole, standing))


def with_earlier(model: nn.Module, plan: Plan) -> Plan:
    """The plan, with a row for each chain that the model has besides, as of an earlier step."""
    known = {row.name for row in plan if row.method is not None}
    beside = {name: found for name, found in chains_in(model).items() if name not in known}
    if not beside:
        return plan
    earlier: list[Row] = []
    methods = dict(plan.decomposers)
    first: dict[int, Row] = {}  # of those that hold a parameter
    for names, chain in beside.values():
        factors = [id(p) for p in chain.parameters() if p is not chain[-1].bias]
        tied = next((first[factor] for factor in factors if factor in first), None)
        alike = [r for r in earlier if tied and tied.name in (r.name, r.tied_to)]
        earlier.append(_row(names, chain, methods, alike))
        first = dict.fromkeys(factors, tied or earlier[-1]) | first
    stages = tuple(f"{name}." for name in beside)
    rows = [r for r in plan if r.name not in beside and not r.name.startswith(stages)]
    return Plan([*earlier, *rows], plan.everything_else, methods, notes=plan.notes)


def plan_of_chains(model: nn.Module) -> Plan:
    """A plan of nothing but the chains that the model has, as they tell it themselves."""
    inside = {id(p) for _, chain in chains_in(model).values() for p in chain.parameters()}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    return with_earlier(model, Plan([], Cost(rest, None), {}))


def tells_of(plan: Plan, name: str, chain: Chain) -> bool:
    """Whether the plan has a row with this name that is of this chain, as it is now."""
    if name not in plan:
        return False
    row = plan[name]
    if (row.method, row.rank, row.layer) != (chain.method, chain.rank, chain.replaced):
        return False
    return _makes(plan.decomposers[chain.decomposer.name], chain)


def _makes(method: Decomposer, chain: Chain) -> bool:
    """Whether a method, of the name of the chain's own, has its options, too."""
    spec, rank = chain.replaced, chain.rank
    assert spec is not None
    assert rank is not None
    return bool(method.stages(spec, rank) == chain.decomposer.stages(spec, rank))


def chains_in(model: nn.Module) -> dict[str, tuple[list[str], Chain]]:
    """The chains that stand for layers, by their first names, with all of their names."""
    names: dict[Chain, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Chain) and module.replaced is not None:
            names.setdefault(module, []).append(name)
    return {its[0]: (its, chain) for chain, its in names.items()}


def _row(
    names: Sequence[str], chain: Chain, methods: dict[str, Decomposer], tied: Sequence[Row]
) -> Row:
    """The row that a chain tells of, and the rows of those that share factors with it.

    The chain's method is added to those that are known by their names.
    """
    spec, method, rank = chain.replaced, chain.decomposer, chain.rank
    assert spec is not None
    assert rank is not None
    if not _makes(methods.setdefault(method.name, method), chain):
        raise ValueError(
            f"layer {names[0]!r}: {method.name!r} has other options there than elsewhere; expected "
            "one plan for the whole model: decompose the original in one step, or register the "
            "method under a name of its own"
        )
    params = chain_cost([spec], None).params
    row = Row(names[0], tuple(names), spec, params, params)
    if tied:
        bias = spec.out_channels if spec.bias else 0
        alike = any(r.layer is not None and r.layer.lookup == spec.lookup for r in tied)
        row = replace(row, params_before=bias, tied_to=tied[0].name, shares_all=alike)
    return planned_row(row, method, rank)


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


def decomposed_part(plan: Plan) -> Plan:
    """The plan without the layers that are left alone."""
    rows = [row for row in plan if row.method is not None]
    return Plan(rows, plan.everything_else, plan.decomposers, notes=plan.notes)


def without_whole(plan: Plan, stored: Collection[str]) -> Plan:
    """The plan without the layers that were put back, whose weights are stored as they were."""
    factors = {name.rpartition(".")[0].rpartition(".")[0] for name in stored}
    whole = {r.name for r in plan if r.method and f"{r.name}.weight" in stored} - factors
    return _layers_again(plan, whole, factors)


def _layers_again(plan: Plan, names: Collection[str], standing: Collection[str]) -> Plan:
    """The plan without these layers, while those that are `standing` go on sharing factors."""
    shared = {row.tied_to or row.name for row in plan if row.name in standing}
    alone = {row.name for row in plan if row.name in names and (row.tied_to or row.name) in shared}
    return _apart(plan, alone).without(dict.fromkeys(names, "it is a layer again"))


def _apart(plan: Plan, names: Collection[str]) -> Plan:
    """The plan in which these layers share factors with no other; the others still do."""
    if not names:
        return plan
    first: dict[str, str] = {}

    def row_of(row: Row) -> Row:
        group = row.tied_to or row.name
        if row.name in names or first.setdefault(group, row.name) == row.name:
            return replace(row, tied_to=None, shares_all=False) if row.tied_to else row
        return replace(row, tied_to=first[group])

    rows = [row_of(row) for row in plan]
    return Plan(rows, plan.everything_else, plan.decomposers, notes=plan.notes)
