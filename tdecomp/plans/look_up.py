"""What choosing ranks asks of each layer, looked up side by side or by workers.

Nothing is returned: the losses keep it, so that whoever asks them next has the answer at once.
"""

from collections.abc import Sequence
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


def look_up_errors(
    offers: Sequence[Offer],
    choices: Sequence[Choice],
    progress: Progress,
    executor: Executor | None,
    *,
    fit: bool,
) -> None:
    """Let the errors to expect of what was chosen be known; with `fit` from the fits themselves."""
    queries = []
    for offer, choice in zip(offers, choices, strict=True):
        if choice.candidate is not None and choice.rank is not None:
            method, rank = choice.candidate.decomposer, choice.rank
            ask = partial(_expected_error, method=method, rank=rank, fit=fit)
            queries.append(Query(offer.site.name, offer.losses, ask))
    title = "fit" if fit else "look up errors"
    work = sum(query.losses.work for query in queries)
    with progress.step(title, len(queries), "layers", work=work) as step:
        answers(queries, step, executor)


def _expected_error(
    losses: LayerLosses, method: Decomposer, rank: Rank, *, fit: bool
) -> float | None:
    if fit:
        losses.fit(method, rank, draft=False)
    return losses.expected_error(method, rank)
