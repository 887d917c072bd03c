"""A budget that accepts a little more loss for less time."""

from collections.abc import Sequence
from dataclasses import replace

from tdecomp.layers.cost import Cost
from tdecomp.ranks.base import Candidate, Choice, Option, RankSelector

# How much more may be lost, as a share of the smallest loss.
_EXTRA_LOSS = 0.3
# The penalties that are searched, as powers of 10 times the loss divided by the time of all layers,
# and how often that interval is halved.
_PENALTIES = (-3.0, 2.0)
_BISECTIONS = 12


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
