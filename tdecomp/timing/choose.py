"""A choice of ranks with measured times: chosen by predictions, then timed as a whole model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from operator import itemgetter

from tdecomp.layers.chain import Rank
from tdecomp.layers.cost import Cost
from tdecomp.loss_curves.losses import LayerLosses
from tdecomp.ranks.base import Candidate, Choice, Option, RankSelector, UnmetError, checked_choices
from tdecomp.timing.layout_times import LatencyPredictor, LayerComparison, LayoutTimes
from tdecomp.timing.speed import Speed
from tdecomp.timing.whole_model import rehearse

# Choices are timed as a whole model until one is this close to its aim, and at most this often.
_CLOSE = 0.02
_REHEARSALS = 5
# The share of a budget that is aimed at, so that noise does not push a measurement beyond it.
_AIM = 0.965
# How much more may be lost, as a share of the smallest loss.
_EXTRA_LOSS = 0.3
# The penalties that are searched, as powers of 10 times the loss divided by the time of all layers,
# and how often that interval is halved.
_PENALTIES = (-3.0, 2.0)
_BISECTIONS = 12


@dataclass(frozen=True)
class TimedChoices:
    """The choices for all layers of a model; with a profile also their times."""

    choices: list[Choice]
    # Of each layer and of what is chosen for it, by the layer's name.
    seconds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    speed: Speed | None = None  # predicted, of the whole model
    rest: float | None = None  # seconds of one pass of the original outside these layers
    least_loss: float | None = None  # no choice loses less, as far as the selector knows

    @property
    def share(self) -> float:
        """The predicted time, as a share of the original's."""
        return (self.speed and self.speed.predicted) or 1.0


def choose_with_times(times: LayoutTimes) -> TimedChoices:
    """The best choices, of those in each layout of the profile.

    A ValueError is raised if the budget cannot be met, or the times scatter by more than it saves.
    """
    found: list[TimedChoices] = []
    refused: dict[str, ValueError] = {}
    for layout in times.profile.layouts:
        try:
            found.append(_choose_in_layout(replace(times, layout=layout)))
        except ValueError as error:
            refused[layout] = error
    if not found:
        raise refused[times.profile.best_layout]
    return min(found, key=partial(_demerit, times.selector.latency))


def _demerit(budget: float | None, timed: TimedChoices) -> tuple[float, float]:
    """What to minimize: without a budget in time the time, else the excess time, then the loss."""
    if budget is None:
        return timed.share, 0.0
    excess = max(0.0, timed.share / budget - 1 - _CLOSE)
    return excess, sum(choice.loss for choice in timed.choices)


def _choose_in_layout(times: LayoutTimes) -> TimedChoices:
    """Choose, time the whole model, correct the predictor by it, and choose again."""
    budget, fastest = times.selector.latency, times.profile.fastest
    points = [(sum(times.layers), times.original)]
    predictor = LatencyPredictor.from_original(*points[0])
    found: list[TimedChoices] = []
    for _ in range(_REHEARSALS):
        timed = _choose_once(times, predictor)
        found.append(timed)
        unchanged = all(choice.candidate is None for choice in timed.choices)
        if budget is None or unchanged or abs(timed.share / (_AIM * budget) - 1) <= _CLOSE:
            break
        # A share of the profile's seconds: the machine may be slower now than it was then, but
        # for both models alike.
        points.append((times.chosen(timed.choices), timed.share * fastest))
        corrected = LatencyPredictor.through(points, near=_AIM * budget * fastest)
        if corrected is None:
            break
        predictor = corrected
    return min(found, key=partial(_demerit, budget))


def _choose_once(times: LayoutTimes, predictor: LatencyPredictor) -> TimedChoices:
    """Choose by predicted times, drop chains that are slower, and time the whole model."""
    offers, layers, selector = times.offers, times.layers, _aimed(times, predictor)
    factor, rest = predictor.factor, replace(times.rest, latency=predictor.rest)
    candidates = [
        [_with_times(c, offer.losses, layer, times, factor) for c in offer.candidates]
        for offer, layer in zip(offers, layers, strict=True)
    ]
    least_loss = selector.least_loss(candidates, rest)
    penalize = times.only_if_faster and selector.weighs_layers and selector.latency is None
    select = partial(choose_with_time_penalty if penalize else checked_choices, selector)
    while True:
        try:
            choices = [times.guard(choice) for choice in select(candidates, rest)]
        except ValueError as error:
            choices = _fastest(times, candidates, error)
        compared = list(map(times.compare, offers, choices))
        reasons = enumerate(map(partial(_too_slow, times), choices, compared))
        slower = {i: reason for i, reason in reasons if reason is not None}
        if not slower or not selector.weighs_layers:
            break
        for i in slower:
            candidates[i] = [_without(c, choices[i]) for c in candidates[i]]
    for i, reason in slower.items():
        choices[i], compared[i] = Choice(reason=reason), None
    speed = rehearse(times, choices)
    if times.only_if_faster and (speed.predicted or 1.0) > 1:
        reason = f"the model with these chains takes {speed.predicted:.2f} of its time"
        choices = [c if c.candidate is None else Choice(reason=reason) for c in choices]
        compared, least_loss = [None] * len(choices), None
        speed = rehearse(times, choices)
    seconds = {
        offer.site.name: (found.before, found.after) if found else (layer, layer)
        for offer, layer, found in zip(offers, layers, compared, strict=True)
    }
    outside = max(0.0, times.original - sum(layers))
    return TimedChoices(choices, seconds, speed, outside, least_loss)


def _aimed(times: LayoutTimes, predictor: LatencyPredictor) -> RankSelector:
    """The selector that asks for the same seconds, as a share of the predicted original's."""
    selector, budget = times.selector, times.selector.latency
    if budget is None:
        return selector
    predicted = predictor.rest + predictor.factor * sum(times.layers)
    aim = 1.0 if budget == 1 else _AIM
    share = min(1.0, aim * budget * times.profile.fastest / predicted)
    if math.isclose(share, budget, rel_tol=1e-6):
        return selector
    return replace(selector, latency=share)  # type: ignore[type-var]


def _with_times(
    candidate: Candidate, losses: LayerLosses, layer: float, times: LayoutTimes, factor: float
) -> Candidate:
    """The candidate with predicted seconds; if time counts, without options that save none."""
    time_counts = times.only_if_faster or times.selector.latency is not None

    def cost(rank: Rank) -> Cost:
        latency = factor * times.chain(losses, candidate, rank)
        return replace(candidate.cost(rank), latency=latency)

    @cache
    def options() -> list[Option]:
        timed = [replace(o, cost=cost(o.rank)) for o in candidate.options()]
        return [o for o in timed if not time_counts or (o.cost.latency or 0.0) < factor * layer]

    before = replace(candidate.before, latency=factor * layer)
    return replace(candidate, before=before, cost=cost, options=options)


def _fastest(
    times: LayoutTimes, candidates: Sequence[Sequence[Candidate]], error: ValueError
) -> list[Choice]:
    """The fastest choices, if they meet a budget that a selector refused by predictions alone."""
    selector, budget = times.selector, times.selector.latency
    if times.only_if_faster and budget is None:
        raise ValueError(
            f"{error}. With only_if_faster=True a chain that is not measurably faster than its "
            "layer does not count"
        ) from error
    others = (getattr(selector, name, None) for name in ("macs", "params"))
    if budget is None or any(share is not None for share in others):
        raise error
    choices = []
    for offered in candidates:
        timed = [(o.cost.latency or 0.0, c, o) for c in offered for o in c.options()]
        if timed:
            _, c, o = min(timed, key=itemgetter(0))
            choices.append(times.guard(Choice(c, o.rank, error=o.error, loss=o.loss)))
        else:
            choices.append(Choice(reason="no chain is faster"))
    least = rehearse(times, choices).predicted or 1.0
    if least > budget:
        raise UnmetError(
            f"Budget: latency={budget} cannot be met: the least is {least:.3f} of the model's "
            "time, measured with these methods and layers. Expected a larger budget, more methods "
            "or fewer layers left alone",
            "macs",
            least,
        ) from error
    return choices


def _too_slow(times: LayoutTimes, choice: Choice, found: LayerComparison | None) -> str | None:
    """Why the chosen chain must not be used, by its time; None if it may, or was not timed."""
    if choice.candidate is None or found is None:
        return None
    taken = f"{1e3 * found.after:.3g} ms against the layer's {1e3 * found.before:.3g} ms"
    words = f"{choice.candidate.method} at rank {choice.rank} takes {taken}"
    low, high = found.ratio.low, found.ratio.high
    if low >= 1 and (times.only_if_faster or times.selector.latency is not None):
        return f"slower: {words}"
    if high < 1 or not times.only_if_faster:
        return None
    return f"not measurably faster: {words}, and the ratio scatters from {low:.2f} to {high:.2f}"


def _without(candidate: Candidate, choice: Choice) -> Candidate:
    """The candidate without the option that was chosen."""
    if choice.candidate is None or candidate.method != choice.candidate.method:
        return candidate
    left = [option for option in candidate.options() if option.rank != choice.rank]
    return replace(candidate, options=lambda: left)


def choose_with_time_penalty(
    selector: RankSelector, candidates: Sequence[Sequence[Candidate]], rest: Cost
) -> list[Choice]:
    """The choices at the largest time penalty whose extra loss is within 30%.

    Many choices lose about the same under a budget, and some of them are much faster. The penalty
    is a Lagrange multiplier: loss per second.
    """
    best = selector.select(candidates, rest)
    most = (1 + _EXTRA_LOSS) * sum(choice.loss for choice in best)
    seconds = sum(offered[0].before.latency or 0.0 for offered in candidates)
    if seconds <= 0:
        return best
    low, high = _PENALTIES
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        penalty = 10**middle * most / seconds
        found = selector.select([[_penalized(c, penalty) for c in o] for o in candidates], rest)
        chosen = [replace(choice, loss=_without_penalty(choice, penalty)) for choice in found]
        if sum(choice.loss for choice in chosen) <= most:
            best, low = chosen, middle
        else:
            high = middle
    return best


def _penalized(candidate: Candidate, penalty: float) -> Candidate:
    """The candidate whose losses include a penalty for the time beyond the layer's."""
    before = candidate.before.latency or 0.0

    def options() -> list[Option]:
        return [
            replace(o, loss=o.loss + penalty * ((o.cost.latency or 0.0) - before))
            for o in candidate.options()
        ]

    return replace(candidate, options=options)


def _without_penalty(choice: Choice, penalty: float) -> float:
    if choice.candidate is None or choice.rank is None:
        return 0.0
    before = choice.candidate.before.latency or 0.0
    after = choice.candidate.cost(choice.rank).latency or 0.0
    return choice.loss - penalty * (after - before)
