"""A budget that gives a little of what it keeps for time."""

from collections.abc import Sequence
from dataclasses import replace

from tdecomp.layers.cost import Cost
from tdecomp.ranks.base import Candidate, Choice, Option, RankSelector

# The part of its loss that is given.
_GIVEN = 0.3
# The prices of time that are searched, in decimal logarithms, relative to the loss over the time
# of all layers; and how often that interval is halved.
_PRICES = (-3.0, 2.0)
_BISECTIONS = 12

Offered = Sequence[Sequence[Candidate]]


def quick_choices(selector: RankSelector, candidates: Offered, rest: Cost) -> list[Choice]:
    """What it takes when a second has the highest price at which little more is lost.

    Many choices lose about the same under a budget, and some of them are much faster.
    """
    best = selector.select(candidates, rest)
    most = (1 + _GIVEN) * sum(choice.loss for choice in best)
    seconds = sum(offered[0].before.latency or 0.0 for offered in candidates)
    if seconds <= 0:
        return best
    low, high = _PRICES
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        price = 10**middle * most / seconds
        found = selector.select([[_priced(c, price) for c in o] for o in candidates], rest)
        chosen = [replace(choice, loss=_true_loss(choice, price)) for choice in found]
        if sum(choice.loss for choice in chosen) <= most:
            best, low = chosen, middle
        else:
            high = middle
    return best


def _priced(candidate: Candidate, price: float) -> Candidate:
    """The candidate with the seconds that its options save as a gain, too."""
    whole = candidate.before.latency or 0.0

    def options() -> list[Option]:
        return [
            replace(o, loss=o.loss + price * ((o.cost.latency or 0.0) - whole))
            for o in candidate.options()
        ]

    return replace(candidate, options=options)


def _true_loss(choice: Choice, price: float) -> float:
    if choice.candidate is None or choice.rank is None:
        return 0.0
    before = choice.candidate.before.latency or 0.0
    after = choice.candidate.cost(choice.rank).latency or 0.0
    return choice.loss - price * (after - before)
