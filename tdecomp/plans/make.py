"""How a plan is made: find the layers, look at them, offer ranks, choose, guard."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial

from torch import nn
from torch.nn.parameter import is_lazy

from tdecomp.calibration.calibrate import site_moments
from tdecomp.calibration.moments import Moments
from tdecomp.calibration.passes import Batches
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.fit_layer import FittedLayer
from tdecomp.layers.cost import Cost, total
from tdecomp.loss_curves.estimate import expected_time
from tdecomp.loss_curves.offers import Offer, able_sites, check_weights, offer_ranks
from tdecomp.model.example import Example
from tdecomp.model.filters import Filters, matches, no_match
from tdecomp.model.sites import Site, Sites, find_sites
from tdecomp.model.ties import settle
from tdecomp.plans.data_notes import data_notes
from tdecomp.plans.guard import guarded
from tdecomp.plans.look_up import look_up_choices, look_up_errors
from tdecomp.plans.model_notes import model_notes
from tdecomp.plans.plan import Plan
from tdecomp.plans.rows import expected_loss, rows_of, settled_choices, with_largest
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
    check_weights(able)
    if isinstance(selector, ByLayer):
        check_keys(selector, sites, choices)
    wanted = {name for site, _ in able for name in (site.name, *site.tied)}
    weighs = selector.weighs_layers
    moments = site_moments(model, sites, wanted, data, gradients=weighs, variants=variants)
    if moments is not None and moments.oddities:
        sites = _leave(found, moments.oddities)
        able, choices = able_sites(sites, request.methods, selector.wants_lookup)
    times = _profile(model, request, sites)
    words = expected_time(able, moments) if weighs and request.progress.shown else ""
    offers = offer_ranks(
        able, moments, curves=weighs, rounding=rounding_of(selector, times),
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
        raise with_largest(unmet, sites, choices, whole) from unmet
    if expect:  # moments keep the fits for `apply`
        fit = isinstance(data, Moments)
        look_up_errors(offers, chosen.choices, request.progress, request.executor, fit=fit)
    choices |= settled_choices(offers, chosen.choices, expect=expect)
    fits: dict[str, tuple[FittedLayer | None, FittedLayer | None]] = {}
    for offer, choice in zip(offers, chosen.choices, strict=True):
        if choice.candidate is not None and choice.rank is not None:
            method, rank = choice.candidate.decomposer, choice.rank
            known = partial(offer.losses.known_fit, method, rank)
            fits[offer.site.name] = known(draft=False), known(draft=True)
    rows = rows_of(sites, choices, chosen.seconds)
    rest = replace(whole - total(row.before for row in rows), latency=chosen.rest)
    loss = None
    if chosen.least_loss is not None:
        loss = expected_loss(chosen.choices, chosen.least_loss)
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


def check_keys(selector: ByLayer, sites: Sequence[Site], left_alone: Mapping[str, Choice]) -> None:
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


def rounding_of(selector: RankSelector, profile: Profile | None) -> Rounding:
    """The multiples of ranks that the selector asks for, or else that suit the machine."""
    if selector.round_to is not None:
        return Rounding(selector.round_to, forced=True)
    return ANY_RANK if profile is None else profile.rounding
