"""How a plan is made: find the layers, look at them, offer ranks, choose, guard."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn
from torch.nn.parameter import is_lazy

from tdecomp.calibration.calibrate import site_moments
from tdecomp.calibration.data import Batches
from tdecomp.calibration.moments import Moments
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.fit_layer import FittedLayer
from tdecomp.layers.cost import Cost, chain_cost, total
from tdecomp.loss_curves.losses import LayerLosses
from tdecomp.loss_curves.offers import Offer, able_sites, offer_ranks
from tdecomp.model.example import Example
from tdecomp.model.filters import Filters, matches, no_match
from tdecomp.model.sites import Site, find_sites
from tdecomp.plans.guard import guarded
from tdecomp.plans.plan import Plan, planned_row
from tdecomp.plans.row import Row
from tdecomp.ranks.base import Choice, RankSelector, checked_choices
from tdecomp.ranks.fixed import ByLayer
from tdecomp.ranks.grid import ANY_RANK, Rounding
from tdecomp.timing.choose import TimedChoices, choose_with_times
from tdecomp.timing.layout_times import LayoutTimes
from tdecomp.timing.measure import check_timing, profile_for
from tdecomp.timing.profile import Profile


@dataclass(frozen=True)
class Request:
    """What a plan is asked for."""

    methods: Sequence[Decomposer]
    selector: RankSelector
    filters: Filters = field(default_factory=Filters)
    example: Example | None = None
    allow_expansion: bool = False
    profile: Profile | None = None
    only_if_faster: bool = False
    progress: bool = True


@dataclass(frozen=True)
class Planned:
    """A plan, and all that was found out on the way to it."""

    plan: Plan
    sites: Mapping[str, Site]
    moments: Moments | None
    # Made to choose ranks, at the chosen method and rank, by the layer's name: a fit is the result,
    # a draft the start of it.
    fits: Mapping[str, FittedLayer] = field(default_factory=dict)
    drafts: Mapping[str, FittedLayer] = field(default_factory=dict)


def make_plan(
    model: nn.Module,
    request: Request,
    data: Batches | Moments | None,
    variants: bool = False,
    *,
    expect: bool,
) -> Planned:
    """The plan; with `expect` its rows say which error to expect, which may take further fits.

    With `variants`, layers that see few patches see variants of the batches, too.
    """
    selector = request.selector
    check_timing(request.profile, request.only_if_faster, selector, request.example)
    found = find_sites(model, request.filters, request.example)
    sites = list(found.values())
    able, choices = able_sites(sites, request.methods)
    if isinstance(selector, ByLayer):
        _check_entries(selector, sites, choices)
    wanted = {site.name for site, _ in able}
    weighs = selector.weighs_layers
    moments = site_moments(model, sites, wanted, data, gradients=weighs, variants=variants)
    times = profile_for(
        request.profile, request.only_if_faster, selector, model, request.example, sites,
        request.methods, request.progress,
    )  # fmt: skip
    offers = offer_ranks(
        able, moments, curves=weighs, largest_share=selector.largest_share,
        rounding=_rounding(selector, times), progress=request.progress,
    )  # fmt: skip
    params = sum(p.numel() for p in model.parameters() if not is_lazy(p))
    whole = Cost(params, None if found.trace is None else found.trace.total_macs)
    chosen, timed = _choose(model, request, times, offers, whole)
    for offer, choice in zip(offers, chosen, strict=True):
        error = _expected_error(choice, offer.losses) if expect else None
        choices[offer.site.name] = replace(choice, error=error)
    counted: set[int] = set()
    rows = [_row(site, choices[site.name], counted, timed) for site in sites]
    rest, speed = whole - total(row.before for row in rows), None
    if timed is not None:
        rest, speed = replace(rest, latency=timed.rest), timed.speed
    plan = Plan(rows, rest, {method.name: method for method in request.methods}, speed)
    fits, drafts = (_known_fits(offers, chosen, draft=draft) for draft in (False, True))
    return Planned(plan, {site.name: site for site in sites}, moments, fits, drafts)


def _choose(
    model: nn.Module,
    request: Request,
    times: Profile | None,
    offers: Sequence[Offer],
    whole: Cost,
) -> tuple[list[Choice], TimedChoices | None]:
    """A guarded choice for each offer, and the measured times where there are any."""
    candidates = [offer.candidates for offer in offers]
    rest = whole - total(listed[0].before for listed in candidates)
    guard: Callable[[Choice], Choice] = (lambda c: c) if request.allow_expansion else guarded
    if times is None:
        chosen = checked_choices(request.selector, candidates, rest)
        return [guard(choice) for choice in chosen], None
    assert request.example is not None
    sites = [offer.site for offer in offers]
    timed = choose_with_times(LayoutTimes(
        sites, candidates, request.selector, rest, times, request.example, model,
        request.only_if_faster, guard,
    ))  # fmt: skip
    return list(timed.choices), timed


def _expected_error(choice: Choice, losses: LayerLosses) -> float | None:
    """Exact or a bound where the method has one; else what the selector's own fits say."""
    if choice.candidate is None or choice.rank is None:
        return None
    error = losses.expected_error(choice.candidate.decomposer, choice.rank)
    return choice.error if error is None else error


def _known_fits(
    offers: Sequence[Offer], choices: Sequence[Choice], *, draft: bool
) -> dict[str, FittedLayer]:
    found = {
        offer.site.name: offer.losses.known_fit(c.candidate.decomposer, c.rank, draft=draft)
        for offer, c in zip(offers, choices, strict=True)
        if c.candidate is not None and c.rank is not None
    }
    return {name: fit for name, fit in found.items() if fit is not None}


def _check_entries(
    selector: ByLayer, sites: Sequence[Site], left_alone: Mapping[str, Choice]
) -> None:
    """Refuse entries that match no layer, or only layers that cannot be decomposed."""
    for pattern in selector.selectors:
        named = [site for site in sites if any(matches(name, pattern) for name in site.names)]
        if not named:
            raise no_match("rank", pattern, [name for site in sites for name in site.names])
        if all(site.name in left_alone for site in named):
            reasons = (f"layer {site.name!r}: {left_alone[site.name].reason}" for site in named)
            raise ValueError(
                f"rank: {pattern!r} names only layers left alone; {'; '.join(reasons)}"
            )


def _rounding(selector: RankSelector, profile: Profile | None) -> Rounding:
    if selector.round_to is not None:
        return Rounding(selector.round_to, forced=True)
    return ANY_RANK if profile is None else profile.rounding


def _row(site: Site, choice: Choice, counted: set[int], timed: TimedChoices | None) -> Row:
    """The site's row; a parameter that it shares with an earlier row is counted there only."""
    own = {id(p): p.numel() for p in site.module.parameters(recurse=False) if not is_lazy(p)}
    params = sum(numel for key, numel in own.items() if key not in counted)
    counted.update(own)
    macs = None if site.spec is None else chain_cost([site.spec], site.calls).macs
    row = Row(
        site.name, site.names, site.spec, params_before=params, params_after=params,
        macs_before=macs, macs_after=macs, reason=choice.reason, note=choice.note, calls=site.calls,
    )  # fmt: skip
    if timed is not None:
        before, after = timed.seconds.get(site.name, (None, None))
        row = replace(row, latency_before=before, latency_after=after)
    if choice.candidate is None or choice.rank is None:
        return row
    row = replace(row, expected_error=choice.error)
    return planned_row(row, choice.candidate.decomposer, choice.rank)
