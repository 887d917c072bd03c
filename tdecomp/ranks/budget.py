"""One budget for the whole model: ranks and methods are chosen together."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
    as_tuple,
    in_form_of,
    is_share,
)
from tdecomp.ranks.grid import last
from tdecomp.ranks.knapsack import Choices, least_cost, least_costs, least_loss, spend_rest, spent

# In this order: the first one is met by an exact search.
_NAMES = ("latency", "macs", "params")
_PER_SECOND = 1e9

# A chain that needs more than this many times the layer's part of the budget is not considered.
_LARGEST_PART = 3.0

Amounts = Callable[[Cost], list[int]]


@dataclass(frozen=True)
class Budget(RankSelector):
    """At most this share of the whole model, where it loses least.

    >>> Budget(macs=0.5)
    Budget(macs=0.5, params=None, latency=None, round_to=None)

    Each layer gets a method and a rank, or is kept as it is, such that the sum of the expected
    losses is least. With moments (``data=``) the loss of a layer is the variance of its output's
    error, weighted by the output's gradients; without, the share of its squared weights.

    Parameters
    ----------
    macs, params : float, optional
        The share of the whole model's MACs or parameters that may be kept, above 0 and at most 1.
        Of several limits, all are met.
    latency : float, optional
        The share of the whole model's time: measured, see `tdecomp.profile`, and corrected after
        the model that was chosen has been timed as a whole.
    round_to : int, optional
        Take only ranks that are multiples of this, or the largest rank where that is smaller. By
        default any rank, and with measured times multiples that the machine runs efficiently.

    Raises
    ------
    ValueError
        If no limit is given, or one is out of range; and when planning, if no choice of ranks
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
        """Chains of several times the layer's part of the budget are not worth a fit."""
        return min(LARGEST_SHARE, _LARGEST_PART * max(share for _, share in self._named()))

    def select(self, sites: Sequence[Sequence[Candidate]], rest: Cost = NOTHING) -> list[Choice]:
        whole = rest + total(candidates[0].before for candidates in sites)
        limits = self._limits(whole) - np.array(self._amounts(rest), dtype=np.int64)
        layers = [_LayerChoices.of(candidates, self._amounts) for candidates in sites]
        picks = least_loss(layers, limits)
        if picks is None:
            raise ValueError(
                f"Budget: {self._shortage(layers, limits, whole, rest)} of the model with these "
                "methods and layers. Expected a larger budget, more methods (methods='auto') or "
                "fewer layers left alone"
            )
        spend_rest(layers, picks, limits)
        choices = [layer.choice(pick) for layer, pick in zip(layers, picks, strict=True)]
        if self.latency is not None:
            return choices  # times are known at the options only
        return _raised_ranks(choices, sites, limits, self._amounts)

    def _named(self) -> list[tuple[str, float]]:
        shares = ((name, getattr(self, name)) for name in _NAMES)
        return [(name, share) for name, share in shares if share is not None]

    def _amounts(self, cost: Cost) -> list[int]:
        """The cost by each budget as integers, whose sums are exact; seconds as nanoseconds."""
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
        self, layers: Sequence[Choices], limits: NDArray[np.int64], whole: Cost, rest: Cost
    ) -> str:
        """Which budgets cannot be met, and the least shares that can."""

        def least_share(i: int, layers_cost: int) -> str:
            amount, reached = self._amounts(whole)[i], layers_cost + self._amounts(rest)[i]
            digits = math.ceil(1e4 * reached / max(amount, 1))
            while math.floor(digits / 1e4 * amount) < reached:  # as `_limits` would round it
                digits += 1
            return f"{digits / 1e4:.4f}"

        least, named = least_costs(layers, limits), self._named()
        words = [
            f"{name}={share} cannot be met: the least is {least_share(i, least[i])}"
            for i, (name, share) in enumerate(named)
            if least[i] > limits[i]
        ]
        if words:
            return "; ".join(words)
        numbers = range(2, len(named) + 1)
        failing = next(n for n in numbers if least_loss(layers, limits[:n]) is None) - 1
        picks = least_cost(layers, failing, limits)
        assert picks is not None
        met = " and ".join(f"{name}={share}" for name, share in named[:failing])
        name, share = named[failing]
        return (
            f"{met} and {name}={share} cannot be met together: with {met} the least {name} "
            f"is {least_share(failing, int(spent(layers, picks)[failing]))}"
        )


@dataclass(frozen=True)
class _LayerChoices(Choices):
    """All that one layer may become, cheapest first; None stands for the layer as it is."""

    options: Sequence[tuple[Candidate, Option] | None]

    @classmethod
    def of(cls, candidates: Sequence[Candidate], amounts: Amounts) -> "_LayerChoices":
        before = candidates[0].before
        entries: list[tuple[list[int], float, tuple[Candidate, Option] | None]] = [
            (amounts(before), 0.0, None)
        ]
        for candidate in candidates:
            for option in candidate.options():
                if option.cost.deciding < before.deciding:
                    entries.append((amounts(option.cost), option.loss, (candidate, option)))
        entries.sort(key=lambda entry: entry[:2])
        costs, losses, options = zip(*entries, strict=True)
        return cls(np.array(costs, dtype=np.int64), np.array(losses), options)

    def choice(self, pick: int) -> Choice:
        option = self.options[pick]
        if option is None:
            return Choice(reason=self._why_kept())
        candidate, found = option
        return Choice(candidate, found.rank, error=found.error, loss=found.loss)

    def _why_kept(self) -> str:
        chains = [pair for pair in self.options if pair is not None]
        if not chains:
            return "kept as it is: no cheaper chain is worth considering"
        candidate, best = min(chains, key=lambda pair: pair[1].loss)
        lost = f"{best.error:.1%} of the output"
        if not candidate.by_outputs:
            lost = f"relative error {best.error:.3f}"
        return (
            "kept as it is: no cheaper chain loses little enough (best: "
            f"{candidate.method} {best.rank}, {lost})"
        )


def _raised_ranks(
    choices: list[Choice],
    sites: Sequence[Sequence[Candidate]],
    limits: NDArray[np.int64],
    amounts: Amounts,
) -> list[Choice]:
    """Ranks between the options: each raised as far as still fits, largest error first."""
    costs = [
        candidates[0].before
        if choice.candidate is None or choice.rank is None
        else choice.candidate.cost(choice.rank)
        for choice, candidates in zip(choices, sites, strict=True)
    ]
    left = limits - sum((np.array(amounts(cost)) for cost in costs), np.zeros_like(limits))
    raised = list(choices)
    for i in sorted(range(len(choices)), key=lambda i: -(choices[i].error or 0.0)):
        candidate, rank = choices[i].candidate, choices[i].rank
        if candidate is None or rank is None or candidate.rounded:
            continue
        now = np.array(amounts(costs[i]))
        higher = _raised(rank, candidate, now + left, amounts)
        left = left + now - np.array(amounts(candidate.cost(higher)))
        raised[i] = replace(choices[i], rank=higher)
    return raised


def _raised(rank: Rank, candidate: Candidate, limits: NDArray[Any], amounts: Amounts) -> Rank:
    """The largest rank from this one on that fits; of several ranks the first is raised last."""
    ranks, largest = list(as_tuple(rank)), as_tuple(candidate.max_rank)

    def fits(i: int, value: int) -> bool:
        cost = candidate.cost(in_form_of(rank, (*ranks[:i], value, *ranks[i + 1 :])))
        saves = cost.deciding < candidate.before.deciding
        return saves and bool(np.all(np.array(amounts(cost)) <= limits))

    for i in reversed(range(len(ranks))):
        ranks[i] = last(ranks[i], largest[i], partial(fits, i))
    return in_form_of(rank, ranks)
