"""One budget for the whole model: ranks and methods together."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from tdecomp.layers.chain import Rank
from tdecomp.layers.cost import Cost, total
from tdecomp.ranks.base import (
    LARGEST_SHARE,
    NOTHING,
    Candidate,
    Choice,
    Option,
    RankSelector,
    is_share,
)
from tdecomp.ranks.grid import last

# In this order: the first is met by an exact search.
_NAMES = ("latency", "macs", "params")
_PER_SECOND = 1e9
# Steps that the room is divided into for the exact search; what they round away is spent after.
_LEVELS = 8192
# Decimal logarithms of the price of a second budget, and halvings of the interval between them.
_PRICES = (-9.0, 6.0)
_BISECTIONS = 24

# Times its part of the budget that a layer may keep.
_GENEROUS = 3.0

# What each option of each layer is to be judged by.
Losses = Sequence[NDArray[Any]]


@dataclass(frozen=True)
class Budget(RankSelector):
    """At most this share of the whole model, where it loses least.

    >>> Budget(macs=0.5)
    Budget(macs=0.5, params=None, latency=None, round_to=None)

    Each layer gets the method and the rank, or is left whole, such that the sum of the expected
    losses is least. With moments (``data=``) the loss of a layer is the variance of its output's
    error, weighted by the output's gradients; without, the share of its squared weights.

    Parameters
    ----------
    macs, params : float, optional
        The share of the whole model's that may be kept, above 0 and at most 1. Of several, all
        are met.
    latency : float, optional
        The share of the whole model's time: measured, see `tdecomp.profile`, and corrected after
        the model that was chosen has been timed as a whole.
    round_to : int, optional
        Take only ranks that are multiples of this; of ranks that cannot get so large, the largest.
        By default any rank, and with measured times multiples of what the machine likes.

    Raises
    ------
    ValueError
        If none is given, or one is out of range; and when planning, if no choice of ranks
        meets the budget: the message says what is the least that can be reached.
    """

    weighs_layers: ClassVar[bool] = True

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    round_to: int | None = None

    def __post_init__(self) -> None:
        if all(getattr(self, name) is None for name in _NAMES):
            raise ValueError("Budget: expected macs=, params= or latency=, or several, got none")
        whole = isinstance(self.round_to, int) and not isinstance(self.round_to, bool)
        if self.round_to is not None and not (whole and self.round_to >= 1):
            raise ValueError(
                f"Budget: expected round_to to be a whole number of at least 1, got "
                f"{self.round_to!r}"
            )
        for name in _NAMES:
            share = getattr(self, name)
            if share is not None and not is_share(share):
                raise ValueError(
                    f"Budget: expected {name} above 0 and at most 1, a share of the whole model's, "
                    f"got {share!r}"
                )

    @property
    def largest_share(self) -> float:
        """A layer that keeps several times its part of the budget is as good as left whole."""
        return min(LARGEST_SHARE, _GENEROUS * max(share for _, share in self._named()))

    def select(self, sites: Sequence[Sequence[Candidate]], rest: Cost = NOTHING) -> list[Choice]:
        whole = rest + total(candidates[0].before for candidates in sites)
        limits = self._limits(whole)
        menus = [_Menu(candidates, self._amounts) for candidates in sites]
        room = limits - np.array(self._amounts(rest), dtype=np.int64)
        picks = _within(menus, room)
        if picks is None:
            raise ValueError(
                f"Budget: {self._shortage(menus, room, whole, rest)} of the model with these "
                "methods and layers. Expected a larger budget, more methods (methods='auto') or "
                "fewer layers left alone"
            )
        _spend(menus, picks, room)
        choices = [menu.choice(pick) for menu, pick in zip(menus, picks, strict=True)]
        if self.latency is not None:
            return choices  # times are known at the options only
        return _refined(choices, sites, room, self._amounts)

    def _named(self) -> list[tuple[str, float]]:
        shares = ((name, getattr(self, name)) for name in _NAMES)
        return [(name, share) for name, share in shares if share is not None]

    def _amounts(self, cost: Cost) -> list[int]:
        """In whole numbers, in which no sum loses anything: of seconds, nanoseconds."""
        amounts = ((name, getattr(cost, name) or 0) for name, _ in self._named())
        return [round(_PER_SECOND * a) if name == "latency" else a for name, a in amounts]

    def _limits(self, whole: Cost) -> NDArray[np.int64]:
        if self.macs is not None and whole.macs is None:
            raise ValueError(
                "Budget(macs=...): MACs are counted on example_inputs, got none; pass "
                "example_inputs=..., or use Budget(params=...)"
            )
        if self.latency is not None and whole.latency is None:
            raise ValueError(
                "Budget(latency=...): nothing was timed; expected a plan with example_inputs=..., "
                "for which layers are timed, or profile=..."
            )
        shares = (float(share) for _, share in self._named())
        pairs = zip(shares, self._amounts(whole), strict=True)
        return np.array([math.floor(share * amount) for share, amount in pairs], dtype=np.int64)

    def _shortage(
        self, menus: Sequence["_Menu"], room: NDArray[np.int64], whole: Cost, rest: Cost
    ) -> str:
        """What cannot be met, and the least that can."""

        def least_share(i: int, spent: int) -> str:
            amount, reached = self._amounts(whole)[i], spent + self._amounts(rest)[i]
            digits = math.ceil(1e4 * reached / max(amount, 1))
            while math.floor(digits / 1e4 * amount) < reached:  # as `_limits` would round it
                digits += 1
            return f"{digits / 1e4:.4f}"

        least, named = _least(menus, room), self._named()
        words = [
            f"{name}={share} cannot be met: the least is {least_share(i, least[i])}"
            for i, (name, share) in enumerate(named)
            if least[i] > room[i]
        ]
        if words:
            return "; ".join(words)
        last = next(n for n in range(2, len(named) + 1) if _within(menus, room[:n]) is None) - 1
        spent = _least_of(menus, last, room)
        before = " and ".join(f"{name}={share}" for name, share in named[:last])
        name, share = named[last]
        return (
            f"{before} and {name}={share} cannot be met together: with {before} the least {name} "
            f"is {least_share(last, spent)}"
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
        self.costs = np.array([entry[2] for entry in entries], dtype=np.int64)  # (options, budgets)
        self.losses = np.array([entry[3] for entry in entries])

    def choice(self, pick: int) -> Choice:
        candidate, option, _, _ = self.entries[pick]
        if candidate is None or option is None:
            return Choice(reason="left whole: the budget is better spent on it")
        return Choice(candidate, option.rank, error=option.error, loss=option.loss)


def _within(
    menus: Sequence[_Menu], room: NDArray[np.int64], losses: Losses | None = None
) -> list[int] | None:
    """The picks that lose least within the room, or None if nothing was found that fits.

    The first budget is met by dynamic programming, each further one by a price per unit that is
    added to the losses: the lowest at which the sum fits, found by bisection (Shoham and Gersho
    1988, "Efficient bit allocation for an arbitrary set of quantizers").
    """
    losses = [menu.losses for menu in menus] if losses is None else losses
    last = len(room) - 1
    if np.any(_least(menus, room) > room):
        return None
    if last == 0:
        return _knapsack(menus, losses, room[0])
    unit = sum(float(loss.max()) for loss in losses) / max(room[last], 1.0)

    def picks(price: float) -> list[int] | None:
        pairs = zip(menus, losses, strict=True)
        priced = [loss + price * unit * menu.costs[:, last] for menu, loss in pairs]
        return _within(menus, room[:last], priced)

    def fits(found: Sequence[int] | None) -> bool:
        return found is not None and bool(_spent(menus, found)[last] <= room[last])

    free = picks(0.0)
    if free is None or fits(free):
        return free
    best = _within(menus, room[:last], [menu.costs[:, last] for menu in menus])
    if not fits(best):
        return None
    low, high = _PRICES  # decimal logarithms
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if fits(found := picks(10**middle)):
            best, high = found, middle
        else:
            low = middle
    return best


def _least_of(menus: Sequence[_Menu], budget: int, room: NDArray[np.int64]) -> int:
    """The least of one cost that was found with those before it within the room."""
    picks = _within(menus, room[:budget], [menu.costs[:, budget] for menu in menus])
    assert picks is not None
    return int(_spent(menus, picks)[budget])


def _knapsack(menus: Sequence[_Menu], losses: Losses, room: int) -> list[int]:
    """The picks of least loss whose first cost stays within the room, which all the least do."""
    least = [menu.costs[:, 0].min() for menu in menus]
    spare = room - sum(least)
    firsts = zip(menus, least, strict=True)
    steps = [_steps(menu.costs[:, 0] - base, spare) for menu, base in firsts]
    reached = np.zeros(_LEVELS + 1)  # the least loss so far with at most so many steps spent
    taken = np.zeros((len(menus), _LEVELS + 1), dtype=np.int32)
    for needed, loss, row in zip(steps, losses, taken, strict=True):
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
    for needed, row in zip(reversed(steps), taken[::-1], strict=True):
        picks.append(int(row[level]))
        level -= int(needed[picks[-1]])
    return picks[::-1]


def _steps(extra: NDArray[np.int64], spare: int) -> NDArray[np.int64]:
    """The levels that each cost takes, rounded up: in whole numbers, where no share is lost."""
    rounded: NDArray[np.int64] = -(-extra * _LEVELS // max(spare, 1))
    return np.where(extra > spare, _LEVELS + 1, rounded)


def _least(menus: Sequence[_Menu], room: NDArray[np.int64]) -> NDArray[np.int64]:
    """The least of each cost within the first budgets, whatever the others are."""
    return sum((m.costs.min(axis=0)[: len(room)] for m in menus), np.zeros_like(room))


def _spent(menus: Sequence[_Menu], picks: Sequence[int]) -> NDArray[np.int64]:
    spent: NDArray[np.int64] = np.sum(
        [m.costs[p] for m, p in zip(menus, picks, strict=True)], axis=0
    )
    return spent


def _spend(menus: Sequence[_Menu], picks: list[int], room: NDArray[np.int64]) -> None:
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
    room: NDArray[np.int64],
    amounts: Callable[[Cost], list[int]],
) -> list[Choice]:
    """Ranks between the options: each raised by as much as still fits, largest error first."""
    costs = [
        candidates[0].before
        if choice.candidate is None or choice.rank is None
        else choice.candidate.cost(choice.rank)
        for choice, candidates in zip(choices, sites, strict=True)
    ]
    left = room - sum((np.array(amounts(cost)) for cost in costs), np.zeros_like(room))
    refined = list(choices)
    for i in sorted(range(len(choices)), key=lambda i: -(choices[i].error or 0.0)):
        candidate, rank = choices[i].candidate, choices[i].rank
        if candidate is None or rank is None or candidate.rounded:
            continue
        now = np.array(amounts(costs[i]))
        raised = _raised(rank, candidate, now + left, amounts)
        left = left + now - np.array(amounts(candidate.cost(raised)))
        refined[i] = replace(choices[i], rank=raised)
    return refined


def _raised(
    rank: Rank,
    candidate: Candidate,
    limits: NDArray[np.int64],
    amounts: Callable[[Cost], list[int]],
) -> Rank:
    """The largest rank from this one on that fits; of several ranks the first is raised last."""

    def fits(rank: Rank) -> bool:
        cost = candidate.cost(rank)
        saves = cost.deciding < candidate.before.deciding
        return saves and bool(np.all(np.array(amounts(cost)) <= limits))

    if isinstance(rank, int):
        assert isinstance(candidate.max_rank, int)
        return last(rank, candidate.max_rank, fits)
    assert isinstance(candidate.max_rank, tuple)
    ranks = list(rank)
    for i in reversed(range(len(ranks))):

        def fits_here(value: int, i: int = i) -> bool:
            return fits((*ranks[:i], value, *ranks[i + 1 :]))

        ranks[i] = last(ranks[i], candidate.max_rank[i], fits_here)
    return tuple(ranks)
