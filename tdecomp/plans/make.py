"""What to do with each layer: sites × decomposers × a rank selector make a Plan."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from tdecomp.calibration.data import Source
from tdecomp.calibration.moments import Moments
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.methods import Methods, listed_methods
from tdecomp.layers.cost import Cost, chain_cost, total
from tdecomp.loss_curves.candidates import candidate, rank_options
from tdecomp.loss_curves.layer_losses import LayerLosses
from tdecomp.model.filters import Filters, matches, no_match
from tdecomp.model.sites import Site, find_sites
from tdecomp.parallel import each, on_cpu
from tdecomp.plans.plan import Plan, planned_row
from tdecomp.plans.row import Row
from tdecomp.ranks.base import Candidate, Choice, RankSelector
from tdecomp.ranks.breakeven import by_parameters
from tdecomp.ranks.fixed import ByLayer
from tdecomp.ranks.grid import ANY_RANK, Rounding
from tdecomp.ranks.short_forms import get_selector
from tdecomp.timing.choose import TimedChoice
from tdecomp.timing.clock import Clock
from tdecomp.timing.profile import Profile


def plan_from(
    model: nn.Module,
    methods: Methods,
    rank: Any,
    example_inputs: Any,
    filters: Filters,
    source: Source,
    allow_expansion: bool,
    clock: Clock,
    *,
    expect: bool,
) -> tuple[Plan, Moments | None]:
    """The plan, and the moments it was made with; without `expect` errors are not foreseen."""
    selector = get_selector(rank)
    decomposers = listed_methods(methods)
    clock.refuse_without(example_inputs, selector)
    found = find_sites(model, filters, example_inputs)
    sites, seen = list(found.values()), found.trace

    open_sites: list[Site] = []
    able: list[list[Decomposer]] = []
    choices: dict[str, Choice] = {}
    for site in sites:
        if site.reason is not None or site.spec is None:
            choices[site.name] = Choice(reason=site.reason)
            continue
        taking = [d for d in decomposers if d.refusal(site.spec) is None]
        if not taking:
            reasons = (d.refusal(site.spec) for d in decomposers)
            choices[site.name] = Choice(reason="; ".join(r for r in reasons if r))
            continue
        check_weight(site)
        open_sites.append(site)
        able.append(taking)
    if isinstance(selector, ByLayer):
        _check_entries(selector, sites, choices)
    wanted = {site.name for site in open_sites}
    moments = source.moments(model, sites, wanted, gradients=selector.weighs_layers)
    by_name = {d.name: d for d in decomposers}
    times = clock.profile_for(selector, model, example_inputs, decomposers, source.progress)
    rounding = _rounding(selector, times)
    offers = rank_options(open_sites, able, moments, selector.largest_share, rounding)
    candidates = [
        [candidate(site, d, offer) for d in taking]
        for site, taking, offer in zip(open_sites, able, offers, strict=True)
    ]
    everything = sum((p.numel() for p in model.parameters() if not _lazy(p)), 0)
    whole = Cost(everything, None if seen is None else seen.total_macs)
    rest = whole - total(c[0].before for c in candidates)
    # Without any layer to choose for, too: a budget for the whole model has to say that it fails.
    if selector.weighs_layers:
        _fit_options(open_sites, candidates, moments, source.progress)
    timed = None
    if times is None:
        selected = selector.select(candidates, rest)
    else:
        timed = TimedChoice(
            model,
            example_inputs,
            open_sites,
            candidates,
            by_name,
            selector,
            rest,
            times,
            clock.only_if_faster,
            _as_it_is if allow_expansion else _guarded,
        ).best()
        selected = timed.choices
    for site, choice, offer in zip(open_sites, selected, offers, strict=True):
        if not allow_expansion:
            choice = _guarded(choice)
        error = _expected_error(choice, by_name, offer.losses) if expect else None
        choices[site.name] = replace(choice, error=error)

    counted: set[int] = set()
    rows = [_row(site, choices[site.name], by_name, counted) for site in sites]
    if timed is not None:
        rows = [timed.on(row) for row in rows]
    macs = None if seen is None else seen.total_macs
    others = _everything_else(model, rows, macs, None if timed is None else timed.rest)
    planned = Plan(rows, others, by_name, None if timed is None else timed.speed.expected)
    return planned, moments


def _expected_error(
    choice: Choice, decomposers: Mapping[str, Decomposer], losses: LayerLosses
) -> float | None:
    """Exact or a bound where the method has such; else what the selector's own fits say."""
    if choice.candidate is None or choice.rank is None:
        return None
    error = losses.expected_error(decomposers[choice.candidate.method], choice.rank)
    return choice.error if error is None else error


def _fit_options(
    sites: Sequence[Site],
    candidates: Sequence[Sequence[Candidate]],
    moments: Moments | None,
    progress: bool,
) -> None:
    """Fit what a selector that weighs layers is going to ask for, with a bar."""

    def fit(layer: tuple[Site, Sequence[Candidate]]) -> None:
        for one in layer[1]:
            one.options()

    def size(layer: tuple[Site, Sequence[Candidate]]) -> int:
        return entries(layer[0], moments)

    with tqdm(total=len(sites), desc="plan", unit="layer", disable=not progress) as bar:
        layers = list(zip(sites, candidates, strict=True))
        each(fit, layers, size=size, done=lambda _layer, _none: bar.update())


def entries(site: Site, moments: Moments | None) -> int:
    """How many numbers a fit of this layer works on; 0 where they are not the processor's."""
    weight, spec = site.module.weight, site.spec
    assert isinstance(weight, nn.Parameter)
    if moments is None or spec is None or site.name not in moments:
        return on_cpu(weight)
    # A fit to data makes many small steps on a moment where one to weights makes few large ones.
    return max(on_cpu(weight), spec.fan_in**2 // 4) if on_cpu(weight) else 0


def _check_entries(
    selector: ByLayer, sites: Sequence[Site], left_alone: Mapping[str, Choice]
) -> None:
    """Refuse entries that match no layer, or none that can be decomposed."""
    for pattern in selector.selectors:
        named = [site for site in sites if any(matches(name, pattern) for name in site.names)]
        if not named:
            raise no_match("rank", pattern, [name for site in sites for name in site.names])
        if all(site.name in left_alone for site in named):
            reasons = (f"layer {site.name!r}: {left_alone[site.name].reason}" for site in named)
            raise ValueError(
                f"rank: {pattern!r} names only layers left alone; {'; '.join(reasons)}"
            )


def check_weight(site: Site) -> None:
    """Refuse weights that no factorization can be made of."""
    for name, parameter in site.module.named_parameters(recurse=False):
        if parameter.is_meta:
            raise ValueError(
                f"layer {site.name!r} ({site.spec}): its {name} is on the meta device and has no "
                "values; load the weights first (model.to_empty(device=...), load_state_dict)"
            )
        if math.isfinite(float(parameter.detach().sum())):
            continue  # nothing that is not finite leaves a sum finite, and sums are fast
        if not bool(torch.isfinite(parameter).all()):
            bad = int((~torch.isfinite(parameter)).sum())
            raise ValueError(
                f"layer {site.name!r} ({site.spec}): {bad} of {parameter.numel()} entries of its "
                f"{name} are NaN or infinite; expected finite values. Mend the weights or leave "
                f"the layer alone with exclude=[{site.name!r}]"
            )


def as_patterns(patterns: str | Sequence[str] | None) -> tuple[str, ...]:
    """A filter as the user writes it: one pattern, several, or none."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns or ())


def _rounding(selector: RankSelector, profile: Profile | None) -> Rounding:
    if selector.round_to is not None:
        return Rounding(selector.round_to, forced=True)
    return ANY_RANK if profile is None else profile.rounding


def _as_it_is(choice: Choice) -> Choice:
    return choice


def _guarded(choice: Choice) -> Choice:
    """The choice, unless its chain would not be cheaper than the layer."""
    if choice.candidate is None or choice.rank is None:
        return choice
    before, after = choice.candidate.before, choice.candidate.cost(choice.rank)
    if after.deciding >= before.deciding:
        return Choice(
            reason=f"{choice.candidate.method} at rank {choice.rank} would not save "
            f"{before.unit}: {after.deciding:,} against the layer's {before.deciding:,}"
        )
    notes = (choice.note, by_parameters(choice.candidate))
    return replace(choice, note="; ".join(dict.fromkeys(n for n in notes if n)) or None)


def _row(
    site: Site, choice: Choice, decomposers: Mapping[str, Decomposer], counted: set[int]
) -> Row:
    """The site's row; a parameter that it shares with an earlier row is counted there only."""
    own = {id(p): p.numel() for p in site.module.parameters(recurse=False) if not _lazy(p)}
    params = sum(numel for key, numel in own.items() if key not in counted)
    counted.update(own)
    macs = None if site.spec is None else chain_cost([site.spec], site.calls).macs
    before = Cost(params, macs)
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
    row = replace(row, expected_error=choice.error)
    return planned_row(row, decomposers[choice.candidate.method], choice.rank)


def _everything_else(
    model: nn.Module, rows: Sequence[Row], total_macs: int | None, rest: float | None
) -> Cost:
    params = sum(p.numel() for p in model.parameters() if not _lazy(p))
    return replace(Cost(params, total_macs) - total(row.before for row in rows), latency=rest)


def _lazy(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, nn.parameter.UninitializedParameter)
