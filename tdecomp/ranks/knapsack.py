"""One choice for each layer, of least loss within one or several budgets: a knapsack problem."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tdecomp.ranks.relaxation import Choices, Losses, Relaxation, least_costs, relax

# How much more than the lower bound is close enough to it, as a share of what is found.
_CLOSE = 1e-4
# How many partial choices are followed at a time; the many are tried where the few are not enough.
_WIDTHS = (128, 8192)


def least_loss(
    layers: Sequence[Choices], limits: NDArray[np.int64], losses: Losses | None = None
) -> list[int] | None:
    """The index of one choice for each layer, of least loss within the limits; None if none fits.

    Limits are for all layers together; costs of budgets beyond them are ignored. `losses` are
    minimised instead of the layers' own if they are given.
    """
    if np.any(least_costs(layers, limits) > limits):
        return None
    losses = [layer.losses for layer in layers] if losses is None else losses
    relaxed = relax(layers, limits, losses)
    best, least, ceiling = None, math.inf, math.inf
    for width in _WIDTHS:
        picks, certain = _search(relaxed, losses, ceiling, width)
        if picks is not None:
            found = sum(float(loss[pick]) for loss, pick in zip(losses, picks, strict=True))
            if found < least:
                best, least = picks, found
            ceiling = least - relaxed.bound - _CLOSE * abs(least)
        if certain or ceiling <= 0:
            return best
    if best is None and len(limits) > 1:  # only what costs least may fit
        cheapest = least_cost(layers, len(limits) - 1, limits)
        if cheapest is not None and np.all(spent(layers, cheapest)[: len(limits)] <= limits):
            return cheapest
    return best


def least_cost(
    layers: Sequence[Choices], budget: int, limits: NDArray[np.int64]
) -> list[int] | None:
    """The picks of the least sum of one cost within the limits of the budgets before it."""
    return least_loss(layers, limits[:budget], [layer.costs[:, budget] for layer in layers])


def spent(layers: Sequence[Choices], picks: Sequence[int]) -> NDArray[np.int64]:
    """The sum of each cost over the choices that were picked."""
    costs = [layer.costs[pick] for layer, pick in zip(layers, picks, strict=True)]
    return np.asarray(np.sum(costs, axis=0), dtype=np.int64)


@dataclass(frozen=True)
class _Partial:
    """Choices for some of the layers, many side by side."""

    regret: NDArray[np.float64]  # (partial,), beyond the lower bound
    loss: NDArray[np.float64]  # (partial,)
    cost: NDArray[np.int64]  # (partial, budgets), beyond the least
    parent: NDArray[np.intp]  # (partial,), the place of what a layer was added to
    choice: NDArray[np.intp]  # (partial,), of that layer

    def only(self, places: NDArray[np.intp]) -> "_Partial":
        return _Partial(*(values[places] for values in vars(self).values()))


def _search(
    relaxed: Relaxation, losses: Losses, ceiling: float, width: int
) -> tuple[list[int] | None, bool]:
    """The picks of least loss of those whose regret is below the ceiling, and if that is certain.

    Layer by layer every choice is added to each of the partial choices that can still fit. Of
    more than `width` of them those of the smallest regret are followed on, and nothing is certain.
    """
    none, nowhere = np.zeros(1), np.zeros(1, dtype=np.intp)
    last = _Partial(none, none, np.zeros((1, len(relaxed.room)), np.int64), nowhere, nowhere)
    useful = [np.flatnonzero(regrets < ceiling) for regrets in relaxed.regrets]
    order = sorted(range(len(useful)), key=lambda i: len(useful[i]))
    steps, certain = [], True
    for i in order:
        regrets, extra = relaxed.regrets[i][useful[i]], relaxed.extra[i][useful[i]]
        sums = last.regret[:, None] + regrets
        fits = sums < ceiling
        for budget, most in enumerate(relaxed.room):
            fits &= last.cost[:, budget, None] + extra[:, budget] <= most
        parent, place = np.nonzero(fits)
        choice = useful[i][place]
        loss, cost = last.loss[parent] + losses[i][choice], last.cost[parent] + extra[place]
        last = _Partial(sums[parent, place], loss, cost, parent, choice)
        if len(parent) > width and i != order[-1]:
            last, certain = last.only(_promising(last, relaxed.room, width)), False
        steps.append(last)
    if not len(last.loss):
        return None, certain
    at, picks = int(np.lexsort((last.cost.sum(axis=1), last.loss))[0]), [0] * len(order)
    for i, step in zip(reversed(order), reversed(steps), strict=True):
        picks[i], at = int(step.choice[at]), int(step.parent[at])
    return picks, certain


def _promising(partial: _Partial, room: NDArray[np.int64], width: int) -> NDArray[np.intp]:
    """The places of the smallest regrets, one for each cost, and of the one that costs least."""
    near = min(4 * width, len(partial.regret))
    found = np.argpartition(partial.regret, near - 1)[:near]
    found = found[np.lexsort((partial.loss[found], *partial.cost[found].T))]
    found = found[np.append(True, np.any(np.diff(partial.cost[found], axis=0) != 0, axis=1))]
    found = found[np.argsort(partial.regret[found], kind="stable")[: width - 1]]
    return np.append(found, np.argmin((partial.cost / np.maximum(room, 1)).max(axis=1)))
