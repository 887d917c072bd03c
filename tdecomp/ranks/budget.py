"""One budget for the whole model: ranks and methods together."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from tdecomp.cost import Cost, total
from tdecomp.ranks.base import NOTHING, Candidate, Choice, Option, RankSelector

# How two budgets are traded against each other: the share of the first one in the price.
_MIXTURES = np.linspace(0.0, 1.0, 9)
_BISECTIONS = 60


@dataclass(frozen=True)
class Budget(RankSelector):
    """At most this share of the whole model, where it loses least.

    >>> Budget(macs=0.5)
    Budget(macs=0.5, params=None)

    Each layer gets the method and the rank, or is left whole, such that the sum of the expected
    losses is least. With moments (``data=``) the loss of a layer is the variance of its output's
    error, weighted by the output's gradients; without, the share of its squared weights.

    Parameters
    ----------
    macs, params : float, optional
        The share of the whole model's that may be kept, above 0 and at most 1. With both, both
        are met.

    Raises
    ------
    ValueError
        If neither is given, or one is out of range; and when planning, if no choice of ranks
        meets the budget: the message says what is the least that can be reached.
    """

    weighs_layers: ClassVar[bool] = True

    macs: float | None = None
    params: float | None = None

    def __post_init__(self) -> None:
        if self.macs is None and self.params is None:
            raise ValueError("Budget: expected macs=, params= or both, got neither")
        for name in ("macs", "params"):
            share = getattr(self, name)
            number = isinstance(share, (int, float)) and not isinstance(share, bool)
            if share is not None and not (number and 0 < share <= 1):
                raise ValueError(
                    f"Budget: expected {name} above 0 and at most 1, a share of the whole model's, "
                    f"got {share!r}"
                )

    def select(self, sites: Sequence[Sequence[Candidate]], rest: Cost = NOTHING) -> list[Choice]:
        whole = rest + total(candidates[0].before for candidates in sites)
        limits = self._limits(whole, sites)
        menus = [_Menu(candidates, self._amounts) for candidates in sites]
        room = limits - np.array(self._amounts(rest), dtype=float)
        least = sum((menu.costs.min(axis=0) for menu in menus), np.zeros(len(limits)))
        if np.any(least > room):
            self._refuse(whole, rest, least, least > room)
        picks = _cheapest_mixture(menus, room, least)
        _spend(menus, picks, room)
        choices = [menu.choice(pick) for menu, pick in zip(menus, picks, strict=True)]
        return _refined(choices, sites, room, self._amounts)

    def _named(self) -> list[tuple[str, float]]:
        shares = (("macs", self.macs), ("params", self.params))
        return [(name, share) for name, share in shares if share is not None]

    def _amounts(self, cost: Cost) -> list[int]:
        return [getattr(cost, name) or 0 for name, _ in self._named()]

    def _limits(self, whole: Cost, sites: Sequence[Sequence[Candidate]]) -> NDArray[np.float64]:
        if self.macs is not None and any(c[0].before.macs is None for c in sites):
            raise ValueError(
                "Budget(macs=...): MACs are counted on example_inputs, got none; pass "
                "example_inputs=..., or use Budget(params=...)"
            )
        shares = np.array([share for _, share in self._named()])
        limits: NDArray[np.float64] = shares * np.array(self._amounts(whole), dtype=float)
        return limits

    def _refuse(
        self, whole: Cost, rest: Cost, least: NDArray[np.float64], missed: NDArray[np.bool_]
    ) -> None:
        words = []
        for i, (name, share) in enumerate(self._named()):
            if missed[i]:
                amount, fixed = self._amounts(whole)[i], self._amounts(rest)[i]
                reachable = math.ceil(1e4 * (least[i] + fixed) / max(amount, 1)) / 1e4
                words.append(f"{name}={share} cannot be met: the least is {reachable:.4f}")
        raise ValueError(
            f"Budget: {'; '.join(words)} of the model with these methods and layers. Expected a "
            "larger budget, more methods (methods='auto') or fewer layers left alone"
        )


class _Menu:
    """The options of one layer, the layer as it is among them, cheapest first."""

    def __init__(
        self, candidates: Sequence[Candidate], amounts: Callable[[Cost], list[int]]
    ) -> None:
        before = candidates[0].before
        entries: list[tuple[Candidate | None, Option | None, list[int], float]] = [
            (None, None, amounts(before), 0.0)
        ]
        for candidate in candidates:
            for option in candidate.options():
                cost = amounts(option.cost)
                if option.cost.deciding < before.deciding:
                    entries.append((candidate, option, cost, option.loss))
        entries.sort(key=lambda entry: (entry[2], entry[3]))
        self.entries = entries
        self.costs = np.array([entry[2] for entry in entries], dtype=float)  # (options, budgets)
        self.losses = np.array([entry[3] for entry in entries])

    def choice(self, pick: int) -> Choice:
        candidate, option, _, _ = self.entries[pick]
        if candidate is None or option is None:
            return Choice(reason="left whole: the budget is better spent on it")
        return Choice(candidate, option.rank, error=option.error)


def _cheapest_mixture(
    menus: Sequence[_Menu], room: NDArray[np.float64], least: NDArray[np.float64]
) -> list[int]:
    """The picks that lose least among those that some prices of the budgets lead to.

    At a price per unit each layer takes the option of least loss plus price; the lowest price at
    which the sum stays within the room is found by bisection (Shoham and Gersho 1988, "Efficient
    bit allocation for an arbitrary set of quantizers").
    """
    mixtures = [np.ones(1)] if len(room) == 1 else [np.array([m, 1 - m]) for m in _MIXTURES]
    scale = np.maximum(room, 1.0)
    best, least_loss = [int(np.argmin(menu.costs.sum(axis=1))) for menu in menus], math.inf
    for mixture in mixtures:
        prices = mixture / scale

        def picks(price: float, prices: NDArray[np.float64] = prices) -> list[int]:
            return [int(np.argmin(m.losses + price * (m.costs @ prices))) for m in menus]

        def fits(found: Sequence[int]) -> bool:
            return bool(np.all(_spent(menus, found) <= room))

        low, high = -70.0, 70.0  # logarithms of the price
        if not fits(picks(math.exp(high))):
            continue
        if fits(picks(0.0)):
            return picks(0.0)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if fits(picks(math.exp(middle))) else (middle, high)
        found = picks(math.exp(high))
        loss = sum(m.losses[p] for m, p in zip(menus, found, strict=True))
        if loss < least_loss:
            best, least_loss = found, loss
    if math.isinf(least_loss) and np.any(_spent(menus, best) > room):
        # The two budgets pull apart: start from the least of the tighter one.
        tight = int(np.argmax(least / scale))
        best = [int(np.argmin(menu.costs[:, tight])) for menu in menus]
    return best


def _spent(menus: Sequence[_Menu], picks: Sequence[int]) -> NDArray[np.float64]:
    spent: NDArray[np.float64] = np.sum(
        [m.costs[p] for m, p in zip(menus, picks, strict=True)], axis=0
    )
    return spent


def _spend(menus: Sequence[_Menu], picks: list[int], room: NDArray[np.float64]) -> None:
    """Use what is left: the exchange that saves most loss for what it costs, until none fits."""
    scale = np.maximum(room, 1.0)
    while True:
        left = room - _spent(menus, picks)
        best, best_gain = None, 0.0
        for i, (menu, pick) in enumerate(zip(menus, picks, strict=True)):
            extra = menu.costs - menu.costs[pick]
            saved = menu.losses[pick] - menu.losses
            allowed = np.all(extra <= left, axis=1) & (saved > 0)
            if not allowed.any():
                continue
            price = np.maximum((extra / scale).max(axis=1), 1e-12)
            gains = np.where(allowed, saved / price, 0.0)
            j = int(np.argmax(gains))
            if gains[j] > best_gain:
                best, best_gain = (i, j), gains[j]
        if best is None:
            return
        picks[best[0]] = best[1]


def _refined(
    choices: list[Choice],
    sites: Sequence[Sequence[Candidate]],
    room: NDArray[np.float64],
    amounts: Callable[[Cost], list[int]],
) -> list[Choice]:
    """Ranks between the options: each raised by as much as still fits, largest error first."""

    def cost(choice: Choice, candidates: Sequence[Candidate]) -> Cost:
        if choice.candidate is None or choice.rank is None:
            return candidates[0].before
        return choice.candidate.cost(choice.rank)

    spent = np.sum([amounts(cost(c, s)) for c, s in zip(choices, sites, strict=True)], axis=0)
    left = room - spent
    refined = list(choices)
    for i in sorted(range(len(choices)), key=lambda i: -(choices[i].error or 0.0)):
        candidate, rank = choices[i].candidate, choices[i].rank
        if candidate is None or rank is None:
            continue
        now = np.array(amounts(candidate.cost(rank)), dtype=float)
        limit = candidate.before.deciding
        larger = _larger_ranks(rank, candidate)

        def fits(
            rank: object, candidate: Candidate = candidate, now: NDArray[np.float64] = now,
            limit: int = limit, left: NDArray[np.float64] = left,
        ) -> bool:  # fmt: skip
            new = candidate.cost(rank)  # type: ignore[arg-type]
            return bool(np.all(np.array(amounts(new)) - now <= left)) and new.deciding < limit

        low, high = 0, len(larger)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if fits(larger[middle]) else (low, middle)
        if low:
            refined[i] = Choice(candidate, larger[low - 1], error=choices[i].error)
            left = left - (np.array(amounts(candidate.cost(larger[low - 1]))) - now)
    return refined


def _larger_ranks(rank: object, candidate: Candidate) -> Sequence[int | tuple[int, ...]]:
    """The ranks above this one, in steps of one; of several ranks the first is raised last."""
    limit = candidate.max_rank
    if isinstance(rank, int) and isinstance(limit, int):
        return range(rank + 1, limit + 1)
    assert isinstance(rank, tuple)
    assert isinstance(limit, tuple)
    *kept, last = rank
    return [(*kept, r) for r in range(last + 1, limit[-1] + 1)]
