"""One budget for the whole model: ranks and methods are chosen together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from tdecomp.layers.chain import Rank
from tdecomp.layers.cost import Cost, total
from tdecomp.ranks.base import (
    NOTHING,
    Candidate,
    Choice,
    Option,
    RankSelector,
    UnmetError,
    as_tuple,
    check_share,
    in_form_of,
    is_positive_int,
)
from tdecomp.ranks.grid import last
from tdecomp.ranks.knapsack import least_cost, least_loss, spent
from tdecomp.ranks.relaxation import Choices, least_costs, relax

_NAMES = ("latency", "macs", "params")
_PER_SECOND = 1e9

Amounts = NDArray[np.int64]  # (budgets,)


@dataclass(frozen=True)
class Budget(RankSelector):
    """At most this share of the whole model, where it loses least.

    >>> Budget(macs=0.5)
    Budget(macs=0.5, params=None, latency=None, round_to=None)

    Each layer gets a method and a rank, or is kept as it is, so that the sum of the expected losses
    is least. With moments (``data=``) the loss of a layer is the variance of its output's error,
    weighted by the output's gradients; without, the share of its squared weights. The plan has this
    sum beside a lower bound (``plan.loss``).

    Parameters
    ----------
    macs, params, latency : float, optional
        The share of the whole model's MACs, parameters or time that may be kept, above 0 and at
        most 1. Of several limits, all are met. Time is measured, see `tdecomp.profile`, and
        corrected after the chosen model has been timed as a whole.
    round_to : int, optional
        Take only ranks that are multiples of this, or the largest rank where that is smaller. By
        default any rank, and with measured times multiples that the machine runs efficiently.

    Raises
    ------
    ValueError
        If no limit is given, or one is out of range; and when planning, if no choice of ranks
        meets the budget: the message names the least share that can be reached.
    """

    weighs_layers: ClassVar[bool] = True

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    round_to: int | None = None

    def __post_init__(self) -> None:
        if not self._named():
            raise ValueError("Budget: expected macs=, params= or latency=, or several, got none")
        if self.round_to is not None and not is_positive_int(self.round_to):
            raise ValueError(
                f"Budget: expected round_to to be a whole number of at least 1, got "
                f"{self.round_to!r}"
            )
        for name, share in self._named():
            allowed = "above 0 and at most 1, a share of the whole model's"
            check_share(f"Budget: expected {name}", share, allowed)

    @property
    def saves(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self._named())

    def select(self, sites: Sequence[Sequence[Candidate]], rest: Cost = NOTHING) -> list[Choice]:
        layers, limits = self._problem(sites, rest)
        picks = least_loss(layers, limits)
        if picks is None:
            whole = rest + total(candidates[0].before for candidates in sites)
            least, named = least_costs(layers, limits), self._named()
            missed = [i for i in range(len(named)) if least[i] > limits[i]] or [0]
            raise UnmetError(
                f"Budget: {self._shortage(layers, limits, whole, rest)} of the model with these "
                "methods and layers. Expected a larger budget, more methods (methods='auto') or "
                "fewer layers left alone",
                "params" if named[missed[0]][0] == "params" else "macs",
                max(self._least_share(i, least[i], whole, rest) for i in missed),
            )
        choices = [layer.choice(pick) for layer, pick in zip(layers, picks, strict=True)]
        if self.latency is None:  # times are known at the options only
            costs = [layer.costs[pick] for layer, pick in zip(layers, picks, strict=True)]
            self._raise_ranks(choices, costs, limits - spent(layers, picks))
        return choices

    def least_loss(
        self, sites: Sequence[Sequence[Candidate]], rest: Cost = NOTHING
    ) -> float | None:
        layers, limits = self._problem(sites, rest)
        return relax(layers, limits).bound

    def _problem(
        self, sites: Sequence[Sequence[Candidate]], rest: Cost
    ) -> tuple[list["_LayerChoices"], Amounts]:
        """All that the layers may become, and what all of them may cost together."""
        whole = rest + total(candidates[0].before for candidates in sites)
        limits = self._limits(whole) - self._amounts(rest)
        return [self._choices_of(candidates) for candidates in sites], limits

    def _named(self) -> list[tuple[str, float]]:
        shares = ((name, getattr(self, name)) for name in _NAMES)
        return [(name, share) for name, share in shares if share is not None]

    def _amounts(self, cost: Cost) -> Amounts:
        """The cost by each budget as integers, whose sums are exact; seconds as nanoseconds."""
        amounts = ((name, getattr(cost, name) or 0) for name, _ in self._named())
        listed = [round(_PER_SECOND * a) if name == "latency" else a for name, a in amounts]
        return np.array(listed, dtype=np.int64)

    def _limits(self, whole: Cost) -> Amounts:
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
        shares = np.array([share for _, share in self._named()], dtype=np.float64)
        return np.floor(shares * self._amounts(whole)).astype(np.int64)

    def _shortage(self, layers: Sequence[Choices], limits: Amounts, whole: Cost, rest: Cost) -> str:
        """Which budgets cannot be met, and the least shares that can."""
        least, named = least_costs(layers, limits), self._named()
        words = [
            f"{name}={share} cannot be met: the least is "
            f"{self._least_share(i, least[i], whole, rest):.4f}"
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
        least_share = self._least_share(failing, spent(layers, picks)[failing], whole, rest)
        return (
            f"{met} and {name}={share} cannot be met together: with {met} the least {name} "
            f"is {least_share:.4f}"
        )

    def _least_share(self, i: int, layers_cost: int, whole: Cost, rest: Cost) -> float:
        """The smallest share, to four digits, under which the layers may cost this much."""
        amount = int(self._amounts(whole)[i])
        reached = int(layers_cost + self._amounts(rest)[i])
        digits = math.ceil(1e4 * reached / max(amount, 1))
        while math.floor(digits / 1e4 * amount) < reached:  # as `_limits` would round it
            digits += 1
        return digits / 1e4

    def _choices_of(self, candidates: Sequence[Candidate]) -> "_LayerChoices":
        before = candidates[0].before
        chains = [
            (self._amounts(option.cost), option.loss, (candidate, option))
            for candidate in candidates
            for option in candidate.options()
            if option.cost.amount < before.amount
        ]
        entries = [(self._amounts(before), 0.0, None), *chains]
        entries.sort(key=lambda entry: (*entry[0], entry[1]))
        costs, losses, options = zip(*entries, strict=True)
        return _LayerChoices(np.array(costs), np.array(losses), options)

    def _raise_ranks(self, choices: list[Choice], costs: Sequence[Amounts], left: Amounts) -> None:
        """Raise each rank in place as far as what is left allows, largest error first."""
        for i in sorted(range(len(choices)), key=lambda i: -(choices[i].error or 0.0)):
            candidate, rank = choices[i].candidate, choices[i].rank
            if candidate is None or rank is None or candidate.rounded:
                continue
            allowed = left + costs[i]
            higher = self._raised(rank, candidate, allowed)
            left = allowed - self._amounts(candidate.cost(higher))
            choices[i] = replace(choices[i], rank=higher)

    def _raised(self, rank: Rank, candidate: Candidate, allowed: Amounts) -> Rank:
        """The largest rank that fits, from this one on.

        Of several those that lose least together come first; else the first is raised last.
        """

        def affordable(raised: Rank) -> bool:
            cost = candidate.cost(raised)
            saves = cost.amount < candidate.before.amount and candidate.saves_work(raised)
            return saves and bool(np.all(self._amounts(cost) <= allowed))

        best = [*(candidate.best_ranks() or ())]
        if rank in best:
            place = last(best.index(rank), len(best) - 1, lambda i: affordable(best[i]))
            rank = best[place]
        ranks, largest = list(as_tuple(rank)), as_tuple(candidate.max_rank)

        def fits(i: int, value: int) -> bool:
            return affordable(in_form_of(rank, (*ranks[:i], value, *ranks[i + 1 :])))

        for i in reversed(range(len(ranks))):
            ranks[i] = last(ranks[i], largest[i], partial(fits, i))
        return in_form_of(rank, ranks)


@dataclass(frozen=True)
class _LayerChoices(Choices):
    """All that one layer may become, cheapest first; None stands for the layer as it is."""

    options: Sequence[tuple[Candidate, Option] | None]

    def choice(self, pick: int) -> Choice:
        if (chosen := self.options[pick]) is None:
            return Choice(reason=self._why_kept())
        candidate, option = chosen
        return Choice(candidate, option.rank, error=option.error, loss=option.loss)

    def _why_kept(self) -> str:
        chains = [pair for pair in self.options if pair is not None]
        if not chains:
            return "kept as it is: no cheaper chain is worth considering"
        candidate, best = min(chains, key=lambda pair: pair[1].loss)
        lost = candidate.would_lose(best.rank, best.error)
        return f"kept as it is, as the budget allows: {lost}"
