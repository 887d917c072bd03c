"""Minimising a smooth function by the limited-memory BFGS method, in few evaluations.

Nocedal and Wright 2006, "Numerical Optimization", algorithms 7.4 and 7.5, with the backtracking of
section 3.1. The first step is the negative gradient itself: the caller scales the variables so that
this is about right, where a scale-free method would spend evaluations on finding its length.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# The value and the gradient at a point.
Function = Callable[[Tensor], tuple[float, Tensor]]
# A change of the point, that of the gradient, the product of both, and the square of the second.
_Step = tuple[Tensor, Tensor, Tensor, Tensor]

_HISTORY = 10
_TRIALS = 8  # of a step's length
_DECREASE = 1e-4  # of what the slope promises, which is enough (Nocedal and Wright, equation 3.4)
_CURVED = 1e-12  # a step along which the gradient changes by less teaches nothing
_FIRST = 3  # iterations in which the scale is learnt, and a small gain does not mean the end


def minimise(
    function: Function, start: Tensor, *, n_iter_max: int, tol: float, share: float
) -> tuple[Tensor, float]:
    """The point that is found from a start, a vector, and its value.

    It stops where an iteration gains less than `tol`, or less than this share of the value.
    """
    point, (value, slope) = start, function(start)
    steps: list[_Step] = []
    for iteration in range(n_iter_max):
        direction = _direction(slope, steps)
        found = _backtracked(function, point, value, slope, direction)
        if found is None and steps:  # what was learnt misleads
            steps = []
            found = _backtracked(function, point, value, slope, -slope)
        if found is None:
            break
        before, (moved, value, other) = (point, value, slope), found
        change, bend = moved - point, other - slope
        curved, bent = torch.dot(change, bend), torch.dot(bend, bend)
        if curved > _CURVED * bent:
            steps = [*steps, (change, bend, curved, bent)][-_HISTORY:]
        point, slope = moved, other
        gained = before[1] - value
        if gained < max(tol, share * value) and iteration >= _FIRST - 1:
            break
    return point, value


def _direction(slope: Tensor, steps: list[_Step]) -> Tensor:
    """The negative gradient times the inverse Hessian that the steps so far suggest."""
    direction, weights = -slope, []
    for change, bend, curved, _ in reversed(steps):
        weight = torch.dot(change, direction) / curved
        direction = torch.addcmul(direction, bend, weight, value=-1)
        weights.append(weight)
    if steps:
        *_, curved, bent = steps[-1]
        direction = direction * (curved / bent)
    for (change, bend, curved, _), weight in zip(steps, reversed(weights), strict=True):
        again = torch.dot(bend, direction) / curved
        direction = torch.addcmul(direction, change, weight - again)
    return direction


def _backtracked(
    function: Function, point: Tensor, value: float, slope: Tensor, direction: Tensor
) -> tuple[Tensor, float, Tensor] | None:
    """A point along the direction that is enough better, its value and gradient; or None."""
    length, along = 1.0, float(torch.dot(direction, slope))
    if not along < 0:
        return None
    for _ in range(_TRIALS):
        moved = point + length * direction
        found, other = function(moved)
        if found <= value + _DECREASE * length * along:
            return moved, found, other
        # The minimum of the parabola through what is known, if it is not too near or too far.
        over = found - value - length * along
        best = -along * length / (2 * over) if over > 0 else 0.5
        length *= min(max(best, 0.1), 0.5)
    return None
