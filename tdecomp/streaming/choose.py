"""The plan for a folder: what is asked of the layers' values is read layer by layer, and kept.

    source = open_source(folder)
    found = layers_of(source, skeleton_of(source), Filters(include, exclude))
    chosen = plan_folder(found, Asked(methods, selector), Folders(str(folder)), ...)

`ask` and `offers_in` give the curves of all layers where the selector weighs layers.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tdecomp.calibration.fit_cache import KnownFits, LayerFits, NotKnownError
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.registry import Methods, listed_methods, registered
from tdecomp.layers.cost import Cost, total
from tdecomp.loss_curves.curve import LossCurve
from tdecomp.loss_curves.offers import Able, Offer, able_sites, layer_losses, offers_of
from tdecomp.model.filters import Filters
from tdecomp.model.ties import leader
from tdecomp.plans.data_notes import data_notes
from tdecomp.plans.guard import guarded
from tdecomp.plans.make import check_keys, rounding_of
from tdecomp.plans.plan import Plan, match_sites, options_of
from tdecomp.plans.rows import expected_loss, rows_of, settled_choices, with_largest
from tdecomp.ranks.base import Choice, RankSelector, UnmetError, checked_choices
from tdecomp.ranks.fixed import ByLayer
from tdecomp.ranks.grid import ANY_RANK
from tdecomp.ranks.short_forms import get_selector
from tdecomp.runtime.parallel import in_single_threads, parallel_map
from tdecomp.runtime.progress import Progress
from tdecomp.streaming import jobs
from tdecomp.streaming.jobs import Folders, Question
from tdecomp.streaming.known import facts_from_dict
from tdecomp.streaming.layers import FolderLayers

Known = tuple[LayerFits, dict[str, LossCurve]]


@dataclass(frozen=True)
class Asked:
    """How ranks are to be chosen."""

    methods: Sequence[Decomposer]
    selector: RankSelector
    expect: bool = False  # whether rows are to say which error to expect
    allow_expansion: bool = False  # whether chains are made that save nothing


def asked_for(
    methods: Methods | Plan, rank: Any, filters: Filters
) -> tuple[Asked | Plan, Filters]:  # fmt: skip
    """What a user asks for, and of which layers: a plan is of all, and says everything."""
    if not isinstance(methods, Plan):
        listed = listed_methods(methods)
        _check_kept(listed)
        return Asked(listed, get_selector(rank)), filters
    _check_kept(methods.decomposers.values())
    if rank is not None or filters.include or filters.exclude:
        raise ValueError(
            "stream: a plan says which layers get which methods and ranks; expected no rank, "
            "include or exclude beside it, Plan.edit and Plan.without change it"
        )
    return methods, Filters(include="*")


def _check_kept(methods: Collection[Decomposer]) -> None:
    """Refuse methods with which a plan that is kept in the target could not be read again."""
    for method in methods:
        if method.name not in registered():
            kind = type(method).__name__
            raise ValueError(
                f"stream: the plan is kept in the target, and cannot be read with the method "
                f"{method.name!r}, which is not registered: tdecomp.register({kind}) before"
            )
        options_of(method)


def methods_of(asked: Asked | Plan) -> list[Decomposer]:
    """The methods that may be used."""
    return [*(asked.decomposers.values() if isinstance(asked, Plan) else asked.methods)]


@dataclass(frozen=True)
class FolderPlan:
    """A plan for a folder, and for which rows a draft of the very rank was made on the way."""

    plan: Plan
    drafted: frozenset[str]


def plan_folder(
    found: FolderLayers, asked: Asked | Plan, folders: Folders, *,
    executor: Executor | None, progress: Progress,
) -> FolderPlan:  # fmt: skip
    """Choose a method and a rank for every layer, reading layers only if the choice needs it.

    A plan that there is already is only checked to be of these layers.
    """
    if isinstance(asked, Plan):
        match_sites(found.sites, asked)
        return FolderPlan(asked, frozenset())
    selector = asked.selector
    _check(selector)
    sites = list(found.sites.values())
    able, left_alone = able_sites(sites, asked.methods, selector.wants_lookup)
    if isinstance(selector, ByLayer):
        check_keys(selector, sites, left_alone)
    if not selector.weighs_layers:
        try:
            return _decided(found, asked, able, left_alone, {})
        except NotKnownError:
            pass
    known = ask(found, able, asked, folders, executor=executor, progress=progress)
    try:
        return _decided(found, asked, able, left_alone, known)
    except NotKnownError as error:
        raise ValueError(
            f"{selector}: it asks for more than singular values, for which a model has "
            "to be in memory: tdecomp.plan(model, ...)"
        ) from error


def ask(
    found: FolderLayers, able: Sequence[Able], asked: Asked, folders: Folders, *,
    executor: Executor | None, progress: Progress,
) -> dict[str, Known]:  # fmt: skip
    """By a layer's name what there is to know before ranks are chosen; kept from run to run."""
    weighs = asked.selector.weighs_layers
    rounding = rounding_of(asked.selector, None)
    groups = [found.group(site.name) for site, _ in able]
    # As where the model is in memory: curves side by side, single spectra in turn.
    single = in_single_threads([group[0].weight.numel for group in groups]) if weighs else []
    questions = [
        Question(
            f"facts-{i:06}.json", tuple(group), leader([layer.spec for layer in group]),
            tuple(methods), asked.selector, rounding, asked.expect, bool(single and single[i]),
        )
        for i, (group, (_, methods)) in enumerate(zip(groups, able, strict=True))
    ]  # fmt: skip
    answers = {q.record: jobs.known_record(folders, q.record) for q in questions}
    todo = [q for q in questions if answers[q.record] is None]

    def size(question: Question) -> int:
        on_cpu = folders.device == "cpu"
        shared = executor is not None or (weighs and on_cpu)
        return question.layers[0].weight.numel if shared else 0

    def nbytes(question: Question) -> int:
        return question.layers[0].weight.nbytes

    work = sum(map(nbytes, todo))
    with progress.step("read and plan", work, "B", work=work) as step:

        def keep(question: Question, answer: dict[str, Any]) -> None:
            answers[question.record] = answer
            step.advance(count=nbytes(question), work=nbytes(question))

        parallel_map(
            partial(jobs.facts, folders), todo, size=size, done=keep, executor=executor
        )  # fmt: skip
    return {
        site.name: facts_from_dict(answers[q.record] or {}, methods)
        for (site, methods), q in zip(able, questions, strict=True)
    }


def offers_in(able: Sequence[Able], known: Mapping[str, Known], *, rounded: bool) -> list[Offer]:
    """The ranks that each layer is offered, as far as is known."""
    sites = [site for site, _ in able]
    losses = [
        replace(one, cache=KnownFits(known[site.name][0] if known else LayerFits()))
        for site, one in zip(sites, layer_losses(sites, None), strict=True)
    ]
    curves = [known[site.name][1] if known else {} for site in sites]
    return offers_of(able, losses, curves, rounded=rounded)


def _decided(
    found: FolderLayers, asked: Asked, able: Sequence[Able], left_alone: Mapping[str, Choice],
    known: Mapping[str, Known],
) -> FolderPlan:  # fmt: skip
    selector, sites = asked.selector, list(found.sites.values())
    offers = offers_in(able, known, rounded=rounding_of(selector, None) != ANY_RANK)
    whole = Cost(found.params)
    rest = whole - total(offer.losses.before for offer in offers)
    candidates = [offer.candidates for offer in offers]
    try:
        choices = checked_choices(selector, candidates, rest)
    except UnmetError as unmet:
        raise with_largest(unmet, sites, left_alone, whole) from unmet
    guard: Callable[[Choice], Choice] = partial(guarded, expect=asked.expect)
    chosen = choices if asked.allow_expansion else list(map(guard, choices))
    least = selector.least_loss(candidates, rest)
    settled = {**left_alone, **settled_choices(offers, chosen, expect=asked.expect)}
    rows = rows_of(sites, settled)
    methods = {method.name: method for method in asked.methods}
    loss = None if least is None else expected_loss(chosen, least)
    others = whole - total(row.before for row in rows)
    plan = Plan(rows, others, methods, loss=loss, notes=data_notes(rows, None))
    drafted = frozenset(
        offer.site.name
        for offer, choice in zip(offers, chosen, strict=True)
        if choice.candidate is not None
        and (curve := offer.curves.get(choice.candidate.method)) is not None
        and choice.rank in curve.fitted
    )
    return FolderPlan(plan, drafted)


def _check(selector: RankSelector) -> None:
    """Refuse budgets that need a model that runs."""
    for name in ("macs", "latency"):
        if selector.weighs_layers and getattr(selector, name, None) is not None:
            raise ValueError(
                f"{selector}: {name} are those of a call of the model, which a stream never makes; "
                "expected Budget(params=...), or tdecomp.decompose with the model in memory"
            )
