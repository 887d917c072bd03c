"""What choosing ranks and its errors need of each layer, looked up side by side or by workers."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from functools import partial

from tdecomp.decomposers.base import Decomposer
from tdecomp.layers.chain import Rank
from tdecomp.loss_curves.losses import LayerLosses
from tdecomp.loss_curves.offers import Offer, OfferedLayer, candidate
from tdecomp.loss_curves.query import Query, answers
from tdecomp.plans.guard import guarded
from tdecomp.ranks.base import Choice, LocalSelector, RankSelector
from tdecomp.ranks.fixed import ByLayer
from tdecomp.runtime.progress import Progress


def look_up_choices(
    offers: Sequence[Offer],
    selector: RankSelector,
    progress: Progress,
    executor: Executor,
    *,
    expect: bool,
) -> None:
    """Let workers choose where that reads a layer's values, so that these are known here.

    Only for selectors that look at one layer at a time. The choice that counts is made here
    afterwards, from the same values, and with the same errors.
    """
    queries = []
    for offer in offers:
        own = _own_selector(selector, offer)
        if isinstance(own, LocalSelector):
            layer = OfferedLayer.of(offer.site, rounded=False)
            choose = partial(
                _choose, layer=layer, method=offer.methods[0], selector=own, expect=expect
            )
            queries.append(Query(offer.site.name, offer.losses, choose))
    if queries:
        work = sum(query.losses.work for query in queries)
        with progress.step("choose ranks", len(queries), "layers", work=work) as step:
            answers(queries, step, executor)


def _own_selector(selector: RankSelector, offer: Offer) -> RankSelector | None:
    """The one that chooses for this layer."""
    if not isinstance(selector, ByLayer):
        return selector
    first = offer.candidates[0]
    return selector.selector_of((first.layer, *first.aliases))


def _choose(
    losses: LayerLosses,
    layer: OfferedLayer,
    method: Decomposer,
    selector: LocalSelector,
    *,
    expect: bool,
) -> None:
    with suppress(Exception):  # the choice that counts meets the same error where it is reported
        guarded(selector.choose(candidate(layer, method, losses, {})), expect=expect)


def expected_errors(
    offers: Sequence[Offer],
    choices: Sequence[Choice],
    progress: Progress,
    executor: Executor | None,
    *,
    fit: bool,
) -> Mapping[str, float | None]:
    """By the layers' names the errors to expect of what was chosen; with `fit` those of its fits.

    The fits are kept with the losses, so that the rows' errors are those of the result.
    """
    queries = []
    for offer, choice in zip(offers, choices, strict=True):
        if choice.candidate is not None and choice.rank is not None:
            method, rank = choice.candidate.decomposer, choice.rank
            ask = partial(_expected_error, method=method, rank=rank, fit=fit)
            queries.append(Query(offer.site.name, offer.losses, ask))
    work = sum(query.losses.work for query in queries)
    with progress.step("fit" if fit else "look at errors", len(queries), "layers", work=work) as s:
        found = answers(queries, s, executor)
    return {query.name: error for query, error in zip(queries, found, strict=True)}


def _expected_error(
    losses: LayerLosses, method: Decomposer, rank: Rank, *, fit: bool
) -> float | None:
    if fit:
        losses.fit(method, rank, draft=False)
    return losses.expected_error(method, rank)
