"""The relaxed problem, in which choices may be mixed: its lower bound on what is lost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array

Losses = Sequence[NDArray[Any]]  # of each layer's choices


@dataclass(frozen=True)
class Choices:
    """What one layer may become."""

    costs: NDArray[np.int64]  # (choices, budgets)
    losses: NDArray[np.float64]  # (choices,)


@dataclass(frozen=True)
class Relaxation:
    """A lower bound on the loss within the limits, and how far each choice is above it."""

    bound: float
    extra: list[NDArray[np.int64]]  # each layer's costs, beyond its least ones
    room: NDArray[np.int64]  # what the least costs leave of the limits
    regrets: list[NDArray[np.float64]]  # of each layer's choices, at least 0 and one of them 0


def relax(
    layers: Sequence[Choices], limits: NDArray[np.int64], losses: Losses | None = None
) -> Relaxation:
    """Add the cost of each choice, times a Lagrange multiplier for each budget, to its loss.

    Whatever the multipliers, the least sums minus what the limits cost are a lower bound, and a
    choice within the limits loses at least its regrets more than that. Of all multipliers, those
    of the linear program have the highest bound (Shoham and Gersho 1988, "Efficient bit
    allocation for an arbitrary set of quantizers").
    """
    losses = [layer.losses for layer in layers] if losses is None else losses
    extra = [layer.costs[:, : len(limits)] for layer in layers]
    extra = [cost - cost.min(axis=0) for cost in extra]
    room = limits - least_costs(layers, limits)
    multipliers = _multipliers(extra, room, losses)
    priced = [loss + cost @ multipliers for loss, cost in zip(losses, extra, strict=True)]
    least = [float(values.min()) for values in priced]
    regrets = [values - low for values, low in zip(priced, least, strict=True)]
    return Relaxation(sum(least) - float(multipliers @ room), extra, room, regrets)


def least_costs(layers: Sequence[Choices], limits: NDArray[np.int64]) -> NDArray[np.int64]:
    """The least sum of each cost, whatever the others are."""
    least = (layer.costs.min(axis=0)[: len(limits)] for layer in layers)
    return sum(least, np.zeros_like(limits))


def _multipliers(
    extra: Sequence[NDArray[np.int64]], room: NDArray[np.int64], losses: Losses
) -> NDArray[np.float64]:
    """The dual values of the linear program's limits; 0 where it finds no solution."""
    spare, unit = np.maximum(room, 1), sum(float(np.ptp(loss)) for loss in losses)
    if not unit:
        return np.zeros(len(room))
    owner = np.repeat(np.arange(len(losses)), [len(loss) for loss in losses])
    # Of the types that scipy takes, its stubs do not name sparse arrays.
    one_each: Any = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    found = linprog(
        np.concatenate([loss - loss.min() for loss in losses]) / unit,
        A_ub=(np.concatenate(extra) / spare).T, b_ub=room / spare,
        A_eq=one_each, b_eq=np.ones(len(losses)),
        options={"presolve": False},  # it takes longer than it saves
    )  # fmt: skip
    prices: NDArray[np.float64] = np.zeros(len(room)) if found.status else found.ineqlin.marginals
    return np.maximum(-prices, 0.0) * unit / spare
