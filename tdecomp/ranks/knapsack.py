"""One choice for each layer, of least loss within one or several budgets: a knapsack problem."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Levels that the first budget is divided into. What rounding up to levels leaves is spent later.
_LEVELS = 8192
# Decimal logarithms of the Lagrange multipliers that are searched, and the steps of the bisection.
_MULTIPLIERS = (-9.0, 6.0)
_BISECTIONS = 24

Losses = Sequence[NDArray[Any]]  # of each layer's choices


@dataclass(frozen=True)
class Choices:
    """What one layer may become."""

    costs: NDArray[np.int64]  # (choices, budgets)
    losses: NDArray[np.float64]  # (choices,)


def least_loss(
    layers: Sequence[Choices], limits: NDArray[np.int64], losses: Losses | None = None
) -> list[int] | None:
    """The index of one choice for each layer, of least loss within the limits; None if none fits.

    Limits are for all layers together; costs of budgets beyond them are ignored. `losses` are
    minimised instead of the layers' own if they are given.

    The first limit is met by dynamic programming, exact up to its levels. Each further one is met
    by adding its cost, times a Lagrange multiplier, to the losses: the smallest multiplier at
    which the sum fits, found by bisection (Shoham and Gersho 1988, "Efficient bit allocation for
    an arbitrary set of quantizers").
    """
    losses = [layer.losses for layer in layers] if losses is None else losses
    last = len(limits) - 1
    if np.any(least_costs(layers, limits) > limits):
        return None
    if last == 0:
        return _dynamic_programming(layers, losses, limits[0])
    unit = sum(float(loss.max()) for loss in losses) / max(limits[last], 1.0)

    def picks_at(multiplier: float) -> list[int] | None:
        pairs = zip(layers, losses, strict=True)
        penalised = [loss + multiplier * unit * layer.costs[:, last] for layer, loss in pairs]
        return least_loss(layers, limits[:last], penalised)

    def fits(picks: Sequence[int] | None) -> bool:
        return picks is not None and bool(spent(layers, picks)[last] <= limits[last])

    unlimited = picks_at(0.0)
    if unlimited is None or fits(unlimited):
        return unlimited
    best = least_cost(layers, last, limits)
    if not fits(best):
        return None
    low, high = _MULTIPLIERS
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if fits(picks := picks_at(10**middle)):
            best, high = picks, middle
        else:
            low = middle
    return best


def least_cost(
    layers: Sequence[Choices], budget: int, limits: NDArray[np.int64]
) -> list[int] | None:
    """The picks of the least sum of one cost within the limits of the budgets before it."""
    return least_loss(layers, limits[:budget], [layer.costs[:, budget] for layer in layers])


def least_costs(layers: Sequence[Choices], limits: NDArray[np.int64]) -> NDArray[np.int64]:
    """The least sum of each cost, whatever the others are."""
    least = (layer.costs.min(axis=0)[: len(limits)] for layer in layers)
    return sum(least, np.zeros_like(limits))


def spent(layers: Sequence[Choices], picks: Sequence[int]) -> NDArray[np.int64]:
    """The sum of each cost over the choices that were picked."""
    costs = [layer.costs[pick] for layer, pick in zip(layers, picks, strict=True)]
    return np.asarray(np.sum(costs, axis=0), dtype=np.int64)


def spend_rest(layers: Sequence[Choices], picks: list[int], limits: NDArray[np.int64]) -> None:
    """Exchange picks in place, each time the one that saves most for its cost, while one fits."""
    scale = np.maximum(limits, 1.0)
    while True:
        left = limits - spent(layers, picks)
        best, best_gain = None, 0.0
        for i, (layer, pick) in enumerate(zip(layers, picks, strict=True)):
            extra = layer.costs - layer.costs[pick]
            saved = layer.losses[pick] - layer.losses
            allowed = np.all(extra <= left, axis=1) & (saved > 0)
            if not allowed.any():
                continue
            share = np.maximum((extra / scale).max(axis=1), 1e-12)
            gains = np.where(allowed, saved / share, 0.0)
            j = int(np.argmax(gains))
            if gains[j] > best_gain:
                best, best_gain = (i, j), gains[j]
        if best is None:
            return
        picks[best[0]] = best[1]


def _dynamic_programming(layers: Sequence[Choices], losses: Losses, limit: int) -> list[int]:
    """The picks of least loss whose first costs stay within a limit that the least costs meet."""
    least = [layer.costs[:, 0].min() for layer in layers]
    spare = limit - sum(least)
    pairs = zip(layers, least, strict=True)
    levels = [_levels(layer.costs[:, 0] - base, spare) for layer, base in pairs]
    reached = np.zeros(_LEVELS + 1)  # the least loss of the layers so far, by levels spent at most
    taken = np.zeros((len(layers), _LEVELS + 1), dtype=np.int32)
    for needed, loss, row in zip(levels, losses, taken, strict=True):
        following = np.full(_LEVELS + 1, math.inf)
        for i in np.argsort(needed, kind="stable"):
            if needed[i] > _LEVELS:
                break
            with_it = reached[: _LEVELS + 1 - needed[i]] + loss[i]
            better = with_it < following[needed[i] :]
            following[needed[i] :][better] = with_it[better]
            row[needed[i] :][better] = i
        reached = following
    picks, level = [], _LEVELS
    for needed, row in zip(reversed(levels), taken[::-1], strict=True):
        picks.append(int(row[level]))
        level -= int(needed[picks[-1]])
    return picks[::-1]


def _levels(extra: NDArray[np.int64], spare: int) -> NDArray[np.int64]:
    """The levels that each cost takes, rounded up, in integers; too many for what does not fit."""
    rounded: NDArray[np.int64] = -(-extra * _LEVELS // max(spare, 1))
    return np.where(extra > spare, _LEVELS + 1, rounded)
