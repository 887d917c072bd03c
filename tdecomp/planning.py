"""What to do with each layer: sites × decomposers × a rank selector make a Plan."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn

from tdecomp.chain import Rank
from tdecomp.cost import Cost, chain_cost
from tdecomp.decomposers.base import Decomposer, get_decomposer
from tdecomp.layer import LayerSpec
from tdecomp.linalg import Spectrum
from tdecomp.ranks import Candidate, Choice, get_selector
from tdecomp.ranks.breakeven import by_parameters
from tdecomp.report import Row, Table, calls_from_list, cost_from_dict
from tdecomp.sites import Filters, Site, find_sites

_FORMAT = 1

Methods = str | Decomposer | Sequence[str | Decomposer]


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
    """

    title = "layers to be"

    def __init__(
        self,
        rows: Sequence[Row],
        everything_else: Cost,
        decomposers: Mapping[str, Decomposer],
    ) -> None:
        super().__init__(rows, everything_else)
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
        edited = _planned(row, decomposer, _as_rank(row.rank if rank is None else rank))
        rows = [edited if old is row else old for old in self.rows]
        return Plan(rows, self.everything_else, {**self.decomposers, decomposer.name: decomposer})

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
            return cls(rows, cost_from_dict(data["everything_else"]), decomposers)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a plan's JSON: {type(error).__name__}: {error}") from error


def plan(
    model: nn.Module,
    methods: Methods,
    *,
    rank: Any,
    example_inputs: Any = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    where: Callable[[nn.Module, str], bool] | None = None,
    min_channels: int = 0,
    min_features: int = 0,
    allow_expansion: bool = False,
) -> Plan:
    """Choose a method and a rank for every layer, without changing anything.

    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> plan(model, "svd", rank=4)["0"].params_after
    416

    Parameters
    ----------
    model : nn.Module
    methods : str, Decomposer or a sequence of them
        With several, the first that can take a layer is used.
    rank : int, tuple, float, str, RankSelector or dict
        An int is a rank (for Tucker-2 the same rank twice; a pair is taken as it is), a float
        below 1 that fraction of the largest useful rank, "vbmf" and "breakeven" name selectors;
        see `tdecomp.Ratio`, `VBMF`, `Energy`. A dict gives layers, by name or glob, each their own.
    example_inputs : Tensor, tuple or dict, optional
        One call of the model: a tuple is positional, a dict keyword arguments. MACs are those of
        this call, the batch included; without it only parameters are counted.
    include, exclude : str or sequence of str
        Names, globs, or the name of a container for all that it holds.
    where : callable ``(module, name) -> bool``, optional
    min_channels, min_features : int
        Convolutions and Linear layers narrower than this, on either side, are left alone.
    allow_expansion : bool
        Decompose even where this saves no MACs.

    Returns
    -------
    Plan
        A row for every Linear and convolution; those left alone say why.

    Raises
    ------
    ValueError
        For a rank, a method, a filter, example inputs or weights that cannot be; the message
        names the layer, what was got, what was expected and the remedy.
    """
    selector = get_selector(rank)
    decomposers = _decomposers(methods)
    filters = Filters(_as_tuple(include), _as_tuple(exclude), where, min_channels, min_features)
    sites, seen = find_sites(model, filters, example_inputs)

    open_sites: list[Site] = []
    candidates: list[list[Candidate]] = []
    choices: dict[str, Choice] = {}
    for site in sites:
        if site.reason is not None or site.spec is None:
            choices[site.name] = Choice(reason=site.reason)
            continue
        able = [d for d in decomposers if d.refusal(site.spec) is None]
        if not able:
            reasons = (d.refusal(site.spec) for d in decomposers)
            choices[site.name] = Choice(reason="; ".join(r for r in reasons if r))
            continue
        check_weight(site)
        open_sites.append(site)
        candidates.append([_candidate(site, d) for d in able])
    if candidates:
        selected = selector.select(candidates)
        for site, choice in zip(open_sites, selected, strict=True):
            choices[site.name] = choice if allow_expansion else _guarded(choice)

    by_name = {d.name: d for d in decomposers}
    rows = [_row(site, choices[site.name], by_name) for site in sites]
    return Plan(
        rows, _everything_else(model, rows, None if seen is None else seen.total_macs), by_name
    )


def check_weight(site: Site) -> None:
    """Refuse weights that no factorization can be made of."""
    for name, parameter in site.module.named_parameters(recurse=False):
        if parameter.is_meta:
            raise ValueError(
                f"layer {site.name!r} ({site.spec}): its {name} is on the meta device and has no "
                "values; load the weights first (model.to_empty(device=...), load_state_dict)"
            )
        if not bool(torch.isfinite(parameter).all()):
            bad = int((~torch.isfinite(parameter)).sum())
            raise ValueError(
                f"layer {site.name!r} ({site.spec}): {bad} of {parameter.numel()} entries of its "
                f"{name} are NaN or infinite; expected finite values. Mend the weights or leave "
                f"the layer alone with exclude=[{site.name!r}]"
            )


def _decomposers(methods: Methods) -> list[Decomposer]:
    listed = [methods] if isinstance(methods, (str, Decomposer)) else list(methods)
    if not listed:
        raise ValueError("methods: expected at least one method, got an empty sequence")
    found = [get_decomposer(method) for method in listed]
    names = [d.name for d in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"methods: each at most once, got {', '.join(map(repr, twice))} twice")
    return found


def _as_tuple(patterns: str | Sequence[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _as_rank(rank: Any) -> Rank:
    return tuple(rank) if isinstance(rank, (list, tuple)) else rank


def _candidate(site: Site, decomposer: Decomposer) -> Candidate:
    spec, calls = site.spec, site.calls
    assert spec is not None
    weight = site.module.weight

    @cache
    def spectra() -> tuple[Spectrum, ...] | None:
        assert isinstance(weight, nn.Parameter)
        return decomposer.spectra(weight, spec)

    return Candidate(
        layer=site.name,
        method=decomposer.name,
        max_rank=decomposer.max_rank(spec),
        before=chain_cost([spec], calls),
        cost=lambda rank: chain_cost(decomposer.stages(spec, rank), calls),
        spectra=spectra,
    )


def _guarded(choice: Choice) -> Choice:
    """The choice, unless its chain would not be cheaper than the layer."""
    if choice.candidate is None or choice.rank is None:
        return choice
    before, after = choice.candidate.before, choice.candidate.cost(choice.rank)
    amount = after.macs if before.macs else after.params
    assert amount is not None
    if amount >= before.deciding:
        return Choice(
            reason=f"{choice.candidate.method} at rank {choice.rank} would not save "
            f"{before.unit}: {amount:,} against the layer's {before.deciding:,}"
        )
    notes = (choice.note, by_parameters(choice.candidate))
    return replace(choice, note="; ".join(dict.fromkeys(n for n in notes if n)) or None)


def _row(site: Site, choice: Choice, decomposers: Mapping[str, Decomposer]) -> Row:
    before = Cost(site.params) if site.spec is None else chain_cost([site.spec], site.calls)
    row = Row(
        site.name,
        site.names,
        site.spec,
        params_before=before.params,
        params_after=before.params,
        macs_before=before.macs,
        macs_after=before.macs,
        reason=choice.reason,
        note=choice.note,
        calls=site.calls,
    )
    if choice.candidate is None or choice.rank is None:
        return row
    return _planned(row, decomposers[choice.candidate.method], choice.rank)


def _planned(row: Row, decomposer: Decomposer, rank: Rank) -> Row:
    """The row with this method and rank, and what they cost."""
    if row.layer is None:
        raise ValueError(f"layer {row.name!r} cannot be decomposed: {row.reason}")
    refusal = decomposer.refusal(row.layer)
    if refusal is not None:
        raise ValueError(f"layer {row.name!r} ({row.layer}): {refusal}")
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


def _everything_else(model: nn.Module, rows: Sequence[Row], total_macs: int | None) -> Cost:
    params = sum(p.numel() for p in model.parameters() if not _uninitialised(p))
    rest = params - sum(row.params_before for row in rows)
    if total_macs is None:
        return Cost(rest)
    return Cost(rest, total_macs - sum(row.macs_before or 0 for row in rows))


def _uninitialised(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, nn.parameter.UninitializedParameter)


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
        calls=calls_from_list(data["calls"]),
    )
    if data["method"] is None:
        return row
    return _planned(row, decomposers[data["method"]], _as_rank(data["rank"]))
