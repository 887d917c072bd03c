"""How a plan is made: find the layers, look at them, offer ranks, choose, guard."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial

from torch import nn
from torch.nn.parameter import is_lazy

from tdecomp.calibration.calibrate import site_moments
from tdecomp.calibration.data import Batches
from tdecomp.calibration.moments import Moments
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.fit_layer import FittedLayer
from tdecomp.layers.cost import Cost, total
from tdecomp.loss_curves.estimate import expected_time
from tdecomp.loss_curves.offers import Offer, able_sites, offer_ranks
from tdecomp.model.example import Example
from tdecomp.model.filters import Filters, matches, no_match
from tdecomp.model.sites import Site, Sites, find_sites
from tdecomp.model.ties import settle
from tdecomp.plans.data_notes import data_notes
from tdecomp.plans.expected_loss import ExpectedLoss
from tdecomp.plans.guard import guarded
from tdecomp.plans.left_alone import largest_left_alone
from tdecomp.plans.look_up import look_up_choices, look_up_errors
from tdecomp.plans.model_notes import model_notes
from tdecomp.plans.plan import Plan, planned_row
from tdecomp.plans.row import Row
from tdecomp.ranks.base import Choice, RankSelector, UnmetError, checked_choices
from tdecomp.ranks.fixed import ByLayer
from tdecomp.ranks.grid import ANY_RANK, Rounding
from tdecomp.runtime.progress import SILENT, Progress
from tdecomp.timing.choose import TimedChoices, choose_with_times
from tdecomp.timing.layout_times import LayoutTimes
from tdecomp.timing.measure import check_profile, measure
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
    progress: Progress = SILENT
    left_alone: Mapping[str, str] = field(default_factory=dict)  # layers that broke the model, why
    executor: Executor | None = None


@dataclass(frozen=True)
class Planned:
    """A plan, and all that was found out on the way to it."""

    plan: Plan
    sites: Mapping[str, Site]
    moments: Moments | None
    # By the layer's name the fit, and the draft to start one from, that were made to choose ranks.
    fits: Mapping[str, tuple[FittedLayer | None, FittedLayer | None]] = field(default_factory=dict)


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
    _check_timing(request)
    found = find_sites(model, request.filters, request.example)
    sites = _leave(found, request.left_alone)
    able, choices = able_sites(sites, request.methods, selector.wants_lookup)
    if isinstance(selector, ByLayer):
        _check_keys(selector, sites, choices)
    wanted = {name for site, _ in able for name in (site.name, *site.tied)}
    weighs = selector.weighs_layers
    moments = site_moments(model, sites, wanted, data, gradients=weighs, variants=variants)
    if moments is not None and moments.oddities:
        sites = _leave(found, moments.oddities)
        able, choices = able_sites(sites, request.methods, selector.wants_lookup)
    times = _profile(model, request, sites)
    words = expected_time(able, moments) if weighs and request.progress.shown else ""
    offers = offer_ranks(
        able, moments, curves=weighs, rounding=_rounding(selector, times),
        progress=request.progress, words=words, executor=request.executor,
    )  # fmt: skip
    if request.executor is not None and not weighs:
        look_up_choices(offers, selector, request.progress, request.executor, expect=expect)
    params = sum(p.numel() for p in model.parameters() if not is_lazy(p))
    whole = Cost(params)
    if found.trace is not None:
        whole = Cost(params, found.trace.total_macs, uncounted=found.trace.uncounted)
    try:
        with request.progress.step("choose ranks"):
            chosen = _choose(model, request, times, offers, whole, expect=expect)
    except UnmetError as unmet:
        largest = _largest(sites, choices, whole, unmet.unit)
        raise UnmetError(f"{unmet}{largest}", unmet.unit, unmet.least) from unmet
    if expect:  # moments keep the fits for `apply`
        fit = isinstance(data, Moments)
        look_up_errors(offers, chosen.choices, request.progress, request.executor, fit=fit)
    fits: dict[str, tuple[FittedLayer | None, FittedLayer | None]] = {}
    for offer, choice in zip(offers, chosen.choices, strict=True):
        name, losses = offer.site.name, offer.losses
        choices[name] = replace(choice, error=None)
        if choice.candidate is not None and choice.rank is not None:
            method, rank = choice.candidate.decomposer, choice.rank
            if expect:
                # Exact or a bound where the method has one; else what the selector's own fits say.
                error = losses.expected_error(method, rank)
                choices[name] = choice if error is None else replace(choice, error=error)
            known = partial(losses.known_fit, method, rank)
            fits[name] = known(draft=False), known(draft=True)
        # Without data, layers that have one weight lose the same of it.
        error = choices[name].error if losses.moments is None else None
        others = (other for other in offer.site.tied if other != name)
        choices |= dict.fromkeys(others, replace(choices[name], error=error))
    counted: set[int] = set()
    kinds = {site.name: site.spec is not None and site.spec.lookup for site in sites}
    rows = [
        _row(site, choices[site.name], counted, chosen.seconds, _tie(site, kinds)) for site in sites
    ]
    rest = replace(whole - total(row.before for row in rows), latency=chosen.rest)
    loss = None
    if chosen.least_loss is not None:
        lost = sum(choice.loss for choice in chosen.choices)
        # Round-off may lift the bound a little above what is lost, or drop it below 0.
        loss = ExpectedLoss(lost, min(max(chosen.least_loss, 0.0), lost))
    methods = {method.name: method for method in request.methods}
    notes = (*data_notes(rows, moments), *model_notes(model, rows))
    plan = Plan(rows, rest, methods, chosen.speed, loss, notes)
    return Planned(plan, found, moments, fits)


def _leave(found: Sites, reasons: Mapping[str, str]) -> list[Site]:
    """The rows, with a reason for some that have none of their own."""
    for name in reasons.keys() & found.keys():
        found[name] = replace(found[name], reason=found[name].reason or reasons[name])
    settle(found)
    return list(found.values())


def _check_timing(request: Request) -> None:
    """Raise an error if times are asked for and there is no call of the model to time."""
    check_profile("profile", request.profile)
    asked = {
        "only_if_faster=True": request.only_if_faster,
        "Budget(latency=...)": request.selector.latency is not None,
        "profile=...": request.profile is not None,
    }
    for name, wanted in asked.items():
        if wanted and request.example is None:
            raise ValueError(
                f"{name}: times are those of one call of the model, got no example_inputs; "
                "expected inputs of the batch size that is going to be used"
            )


def _profile(model: nn.Module, request: Request, sites: Sequence[Site]) -> Profile | None:
    """The given profile, checked; a new one if one is needed; None if no times are asked for."""
    profile, example = request.profile, request.example
    if example is None:
        return None
    if profile is not None:
        profile.check(model, example)
    elif request.only_if_faster or request.selector.latency is not None:
        return measure(model, example, sites, request.methods, progress=request.progress)
    return profile


def _choose(
    model: nn.Module, request: Request, times: Profile | None, offers: Sequence[Offer],
    whole: Cost, *, expect: bool,
) -> TimedChoices:  # fmt: skip
    """A guarded choice for each offer, with measured times if there is a profile."""
    selector, example = request.selector, request.example
    rest = whole - total(offer.losses.before for offer in offers)
    guard: Callable[[Choice], Choice] = partial(guarded, expect=expect)
    if request.allow_expansion:
        guard = _as_it_is
    if times is None or example is None:
        candidates = [offer.candidates for offer in offers]
        chosen = list(map(guard, checked_choices(selector, candidates, rest)))
        return TimedChoices(chosen, least_loss=selector.least_loss(candidates, rest))
    return choose_with_times(LayoutTimes(
        offers, selector, rest, times, example, model, request.only_if_faster, guard
    ))  # fmt: skip


def _as_it_is(choice: Choice) -> Choice:
    return choice


def _largest(
    sites: Sequence[Site], left_alone: Mapping[str, Choice], whole: Cost, unit: str
) -> str:
    """In words, what is left alone and costs most in a unit, and why."""
    counted: set[int] = set()
    rows = [_row(site, left_alone.get(site.name, Choice()), counted, {}) for site in sites]
    rest = whole - total(row.before for row in rows)
    found = [
        (row.before, repr(row.name), row.reason or "") for row in rows if row.name in left_alone
    ]
    found.append((rest, "everything else", "no layer's, such as attention's scores"))
    words = largest_left_alone(found, whole, unit)
    return f". Left alone, {words}" if words else ""


def _check_keys(selector: ByLayer, sites: Sequence[Site], left_alone: Mapping[str, Choice]) -> None:
    """Refuse keys that match no layer, or only layers that cannot be decomposed."""
    for pattern in selector.selectors:
        named = [site for site in sites if any(matches(name, pattern) for name in site.names)]
        if not named:
            raise no_match("rank", pattern, [name for site in sites for name in site.names])
        if all(site.name in left_alone for site in named):
            reasons = (f"layer {site.name!r}: {left_alone[site.name].reason}" for site in named)
            raise ValueError(
                f"rank: {pattern!r} names only layers left alone; {'; '.join(reasons)}"
            )
    for site in sites:
        keys = [name for name in site.tied if name in selector.selectors]
        if any(selector.selectors[key] != selector.selectors[keys[0]] for key in keys):
            raise ValueError(
                f"rank: {', '.join(map(repr, keys))} share one weight and have one rank, got "
                "several; expected a rank for one of them"
            )


def _rounding(selector: RankSelector, profile: Profile | None) -> Rounding:
    if selector.round_to is not None:
        return Rounding(selector.round_to, forced=True)
    return ANY_RANK if profile is None else profile.rounding


def _row(
    site: Site,
    choice: Choice,
    counted: set[int],
    seconds: Mapping[str, tuple[float, float]],
    tie: tuple[str | None, bool] = (None, False),
) -> Row:
    """The site's row; a parameter that it shares with an earlier row is counted there only."""
    own = {id(p): p.numel() for p in site.parameters if not is_lazy(p)}
    params = sum(numel for key, numel in own.items() if key not in counted)
    counted.update(own)
    macs = site.macs
    latency_before, latency_after = seconds.get(site.name, (None, None))
    row = Row(
        site.name, site.names, site.spec, params, params, macs, macs, reason=choice.reason,
        note=choice.note, expected_error=choice.error, latency_before=latency_before,
        latency_after=latency_after, calls=site.calls,
        tied_to=tie[0], shares_all=tie[1],
    )  # fmt: skip
    if choice.candidate is None or choice.rank is None:
        return row
    return planned_row(row, choice.candidate.decomposer, choice.rank)


def _tie(site: Site, kinds: Mapping[str, bool]) -> tuple[str | None, bool]:
    """The first row that shares factors with this later one, and whether one is of its kind.

    `kinds` says of each row whether it is a lookup.
    """
    before = site.tied[: site.tied.index(site.name)] if site.tied and not site.reason else ()
    return next(iter(before), None), any(kinds[name] == kinds[site.name] for name in before)
