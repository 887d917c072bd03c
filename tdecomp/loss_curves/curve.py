"""What one layer loses along the ranks of each method: immutable curves."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.interpolate import PchipInterpolator

from tdecomp.decomposers.base import Decomposer
from tdecomp.layers.chain import Rank
from tdecomp.layers.cost import Cost
from tdecomp.loss_curves.losses import LayerLosses, only_rank
from tdecomp.loss_curves.measured import Lost
from tdecomp.ranks.base import Option, as_tuple, spread
from tdecomp.ranks.grid import ANY_RANK, Rounding, rank_steps, steps_along

# The largest share of a layer's cost at which a chain is worth an iterative fit.
_LARGEST = 0.9
# An iterative method is fitted first at this share of the largest cost worth considering. If it
# loses more than `_DOMINATED` times as much as another method that costs at most `_ABOUT` times as
# much, it is dominated, and is not fitted at the ends of its range of ranks.
_PROBE = 1 / 3
_ABOUT = 1.15
_DOMINATED = 1.05
# A method is pointless beside another that contains it and costs at most this many times as much.
_AS_CHEAP = 1.02
# A small share of that cost at which it is fitted, too: few budgets are smaller.
_SMALL = 0.06
# The number of ranks on a curve, fitted or interpolated.
_POINTS = 48
# Losses below this share of the largest are raised to it, so that their logarithm exists.
_LEAST = 1e-12


@dataclass(frozen=True)
class LossCurve:
    """What one layer loses along the ranks of one method.

    >>> table = tdecomp.sensitivity(nn.Sequential(nn.Linear(16, 8)), "svd", progress=False)
    >>> [point.rank for point in table["0"]["svd"].points]
    [1, 2, 3, 4, 5]

    Attributes
    ----------
    method : Decomposer
        The method with its options.
    points : tuple of Option
        Ascending ranks with their costs, losses and errors; empty where the method is not worth
        considering.
    fitted : tuple of rank
        The ranks at which a draft was fitted; the points between them are interpolated. Empty
        where every point is exact.
    note : str or None
        Why there are no points.
    """

    method: Decomposer
    points: tuple[Option, ...] = ()
    fitted: tuple[Rank, ...] = ()
    note: str | None = None


def layer_curves(
    losses: LayerLosses,
    methods: Sequence[Decomposer],
    rounding: Rounding = ANY_RANK,
) -> dict[str, LossCurve]:
    """The curve of each method, with no more fits than tell which methods are worth considering."""
    drafts: dict[str, _Draft] = {}
    notes: dict[str, str] = {}
    closed = [method for method in methods if not method.iterative]
    for method in methods:
        container = _container(losses, method, methods)
        if container is not None:
            notes[method.name] = f"{container} loses no more at the same cost"
        elif closed and losses.learns_a_sample(method):
            notes[method.name] = f"too few patches for it; {closed[0].name} needs fewer"
        else:
            drafts[method.name] = _Draft(losses, method, rounding)
    exact = [draft for draft in drafts.values() if draft.exact]
    dominated = {name: draft.probe(exact) for name, draft in drafts.items()}
    for name, draft in drafts.items():
        dominating = dominated[name] or draft.dominating(drafts.values())
        if dominating is None:
            draft.complete()
        else:
            notes[name] = f"{dominating} loses less at about the same cost"
    return {
        m.name: LossCurve(m, note=notes[m.name]) if m.name in notes else drafts[m.name].curve()
        for m in methods
    }


def _container(
    losses: LayerLosses, method: Decomposer, methods: Sequence[Decomposer]
) -> str | None:
    """Another of the methods that loses no more at about the same cost, rank by rank; or None."""

    def cost_of_one(one: Decomposer) -> int:
        return losses.cost(one, spread(1, one.max_rank(losses.spec))).amount

    names = method.contained_in(losses.spec)
    for other in methods:
        if other.name in names and cost_of_one(other) <= _AS_CHEAP * cost_of_one(method):
            return other.name
    return None


class _Draft:
    """A curve in the making."""

    def __init__(self, losses: LayerLosses, method: Decomposer, rounding: Rounding) -> None:
        nested = None if method.drafts_cost_less else losses.nested(method)
        largest = method.max_rank(losses.spec)
        steps = [rounding.of(most) for most in as_tuple(largest)]
        drafted = nested is not None or method.drafts_cost_less
        best = None if drafted else losses.best_ranks(method, steps)
        self.losses, self.method = losses, method
        self.exact = nested is not None or best is not None
        # Where losses are known without a fit, every rank that saves anything is offered.
        before = losses.before.amount
        self.limit = before - 1 if self.exact else _LARGEST * before
        cost = partial(losses.cost, method)
        if best is None:
            ranks = rank_steps(largest, cost, self.limit, 0.0, _POINTS, rounding)
        else:
            ranks = steps_along([*best], cost, self.limit, _POINTS)
        self.ranks = [rank for rank in ranks if losses.saves_work(method, rank)]
        self.costs = [cost(rank) for rank in self.ranks]
        # By the index of the rank: what it loses as far as is known, and which of these are fits.
        self.known: dict[int, Lost] = {}
        self.fits: set[int] = set()
        self.probed = 0
        if nested is not None:
            self.known = {i: nested[only_rank(rank)] for i, rank in enumerate(self.ranks)}
        elif best is not None:
            self.known = {i: best[rank] for i, rank in enumerate(self.ranks)}

    def _nearest(self, share: float) -> int:
        """The index of the rank whose cost is nearest to a share of the largest one."""
        gaps = [abs(cost.amount - share * self.limit) for cost in self.costs]
        return gaps.index(min(gaps))

    def probe(self, exact: Sequence["_Draft"]) -> str | None:
        """Fit once, unless singular values already name a method that dominates this one."""
        if self.exact or not self.ranks:
            return None
        self.probed = self._nearest(_PROBE)
        least = self.losses.least(self.method, self.ranks[self.probed]) if exact else None
        for other in exact:
            if least is not None and least > _DOMINATED * other.least_at(self.costs[self.probed]):
                return other.method.name
        self._fit(self.probed)
        return None

    def _fit(self, i: int) -> None:
        if i not in self.known:
            self.known[i] = self.losses.fitted(self.method, self.ranks[i])
            self.fits.add(i)

    def dominating(self, others: Iterable["_Draft"]) -> str | None:
        """Another method that loses far less wherever this one is known so far; or None."""
        for other in others:
            beaten = (
                loss > _DOMINATED * other.least_at(self.costs[i])
                for i, (loss, _) in self.known.items()
            )
            if self.ranks and other is not self and all(beaten):
                return other.method.name
        return None

    def least_at(self, cost: Cost) -> float:
        """The least known loss of the ranks that cost about as much or less."""
        limit = _ABOUT * cost.amount
        affordable = (loss for i, (loss, _) in self.known.items() if self.costs[i].amount <= limit)
        return min(affordable, default=math.inf)

    def complete(self) -> None:
        """Fit at both ends and near the cheap one, or extrapolate to the expensive one."""
        if self.ranks:
            self._fit(0)
            self._fit(self._nearest(_SMALL))
            if not self._extrapolated():
                self._fit(len(self.ranks) - 1)

    def _extrapolated(self) -> bool:
        """Fill in the ranks beyond the probe, if the fits at it and below determine them.

        Where a chain with as many weights as the layer loses nothing, the error falls about as
        ``share**-b * (1 - share)`` of the share of the weights: on trained and on Gaussian
        kernels within some hundredths at half of them, a tenth or two at four fifths.
        """
        losses, method, probe = self.losses, self.method, self.probed
        if self.exact or losses.fits_to_data(method) or not method.exact_at_parity(losses.spec):
            return False
        shares = np.array([cost.params / losses.before.params for cost in self.costs])
        small = self._nearest(_SMALL)
        (_, low), (loss, error) = self.known[small], self.known[probe]
        if not (shares[small] < shares[probe] and shares[-1] < 1 and 0 < error < low < math.inf):
            return False
        known = np.log([low, error]) - 2 * np.log1p(-shares[[small, probe]])
        slope = np.diff(known) / np.diff(np.log(shares[[small, probe]]))
        errors = np.exp(known[1] + slope * np.log(shares / shares[probe]) + 2 * np.log1p(-shares))
        for i, value in enumerate(errors.tolist()):
            if i > probe:
                self.known[i] = loss / error * value, value
        return True

    def curve(self) -> LossCurve:
        """The ranks from the first fit to the last, interpolated on a log-log scale."""
        places = sorted(i for i, (loss, _) in self.known.items() if math.isfinite(loss))
        if not places:
            return LossCurve(self.method, note=None if self.ranks else "no rank saves enough")
        sizes = np.log([math.prod(as_tuple(rank)) for rank in self.ranks])
        lines = []
        for values in zip(*(self.known[i] for i in places), strict=True):
            # A larger rank never has to lose more.
            least = max(_LEAST * max(values), np.finfo(np.float64).tiny)
            falling = np.log(np.minimum.accumulate(np.maximum(values, least)))
            if len(places) > 2:
                lines.append(np.exp(PchipInterpolator(sizes[places], falling)(sizes)))
            else:
                lines.append(np.exp(np.interp(sizes, sizes[places], falling)))
        points = [
            Option(rank, cost, float(loss), self.losses.row_error(self.method, float(share)))
            for rank, cost, loss, share in zip(self.ranks, self.costs, *lines, strict=True)
        ]
        fitted = tuple(self.ranks[i] for i in places if i in self.fits)
        return LossCurve(self.method, tuple(points[places[0] : places[-1] + 1]), fitted)
