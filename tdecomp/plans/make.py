"""How a plan is made: find the layers, look at them, offer ranks, choose, guard."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from tdecomp.calibration.data import Batches
from tdecomp.calibration.moments import Moments
from tdecomp.calibration.site_moments import site_moments
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.fit_layer import FittedLayer
from tdecomp.layers.cost import Cost, chain_cost, total
from tdecomp.loss_curves.losses import LayerLosses
from tdecomp.loss_curves.offers import Offer, able_sites, offer_ranks
from tdecomp.model.example import Example
from tdecomp.model.filters import Filters, matches, no_match
from tdecomp.model.sites import Site, find_sites
from tdecomp.model.weights import is_lazy
from tdecomp.plans.guard import guarded
from tdecomp.plans.plan import Plan, planned_row
from tdecomp.plans.row import Row
from tdecomp.ranks.base import Choice, RankSelector
from tdecomp.ranks.fixed import ByLayer
from tdecomp.ranks.grid import ANY_RANK, Rounding
from tdecomp.timing.choose import TimedChoices, choose_with_times
from tdecomp.timing.measure import profile_for
from tdecomp.timing.profile import Profile


@dataclass(frozen=True)
class Request:
    """What a plan is asked for.

    Attributes
    ----------
    methods : sequence of Decomposer
    selector : RankSelector
    filters : Filters
    example : Example or None
    allow_expansion : bool
    profile : Profile or None
        With measured times.
    only_if_faster : bool
    progress : bool
    """

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
    """A plan, and all that was found out on the way to it.

    Attributes
    ----------
    plan : Plan
    sites : mapping of str to Site
    moments : Moments or None
    fits, drafts : mapping of str to FittedLayer
        Made to choose ranks, at the chosen method and rank, by the layer's name: a fit is the
        result, a draft the start of it.
    """

    plan: Plan
    sites: Mapping[str, Site]
    moments: Moments | None
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
    found = find_sites(model, request.filters, request.example)
    sites, trace = list(found.values()), found.trace
    able, choices = able_sites(sites, request.methods)
    if isinstance(request.selector, ByLayer):
        _check_entries(request.selector, sites, choices)
    wanted = {site.name for site, _ in able}
    gradients = request.selector.weighs_layers
    moments = site_moments(model, sites, wanted, data, gradients=gradients, variants=variants)
    times = profile_for(
        request.profile, request.only_if_faster, request.selector, model, request.example, sites,
        request.methods, request.progress,
    )  # fmt: skip
    offers = offer_ranks(
        able,
        moments,
        curves=request.selector.weighs_layers,
        largest_share=request.selector.largest_share,
        rounding=_rounding(request.selector, times),
        progress=request.progress,
    )
    params = sum((p.numel() for p in model.parameters() if not is_lazy(p)), 0)
    macs = None if trace is None else trace.total_macs
    chosen, timed = _choose(model, request, times, offers, Cost(params, macs))
    for offer, choice in zip(offers, chosen, strict=True):
        error = _expected_error(choice, offer.losses) if expect else None
        choices[offer.site.name] = replace(choice, error=error)
    counted: set[int] = set()
    rows = [_row(site, choices[site.name], counted) for site in sites]
    if timed is not None:
        rows = [_with_times(row, timed) for row in rows]
    rest = Cost(params, macs) - total(row.before for row in rows)
    plan = Plan(
        rows,
        replace(rest, latency=None if timed is None else timed.rest),
        {method.name: method for method in request.methods},
        None if timed is None else timed.speed,
    )
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
    guard: Callable[[Choice], Choice] = _unguarded if request.allow_expansion else guarded
    if times is None:
        return [guard(choice) for choice in request.selector.select(candidates, rest)], None
    assert request.example is not None
    timed = choose_with_times(
        [offer.site for offer in offers],
        candidates,
        request.selector,
        rest,
        times,
        request.example,
        model,
        only_if_faster=request.only_if_faster,
        guard=guard,
    )
    return list(timed.choices), timed


def _unguarded(choice: Choice) -> Choice:
    return choice


def _expected_error(choice: Choice, losses: LayerLosses) -> float | None:
    """Exact or a bound where the method has one; else what the selector's own fits say."""
    if choice.candidate is None or choice.rank is None:
        return None
    error = losses.expected_error(choice.candidate.decomposer, choice.rank)
    return choice.error if error is None else error


def _known_fits(
    offers: Sequence[Offer], choices: Sequence[Choice], *, draft: bool
) -> dict[str, FittedLayer]:
    found = {}
    for offer, choice in zip(offers, choices, strict=True):
        if choice.candidate is not None and choice.rank is not None:
            method = choice.candidate.decomposer
            fit = offer.losses.known_fit(method, choice.rank, draft=draft)
            if fit is not None:
                found[offer.site.name] = fit
    return found


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


def _row(site: Site, choice: Choice, counted: set[int]) -> Row:
    """The site's row; a parameter that it shares with an earlier row is counted there only."""
    own = {id(p): p.numel() for p in site.module.parameters(recurse=False) if not is_lazy(p)}
    params = sum(numel for key, numel in own.items() if key not in counted)
    counted.update(own)
    macs = None if site.spec is None else chain_cost([site.spec], site.calls).macs
    row = Row(
        site.name,
        site.names,
        site.spec,
        params_before=params,
        params_after=params,
        macs_before=macs,
        macs_after=macs,
        reason=choice.reason,
        note=choice.note,
        calls=site.calls,
    )
    if choice.candidate is None or choice.rank is None:
        return row
    row = replace(row, expected_error=choice.error)
    return planned_row(row, choice.candidate.decomposer, choice.rank)


def _with_times(row: Row, timed: TimedChoices) -> Row:
    before, after = timed.seconds.get(row.name, (None, None))
    return replace(row, latency_before=before, latency_after=after)
