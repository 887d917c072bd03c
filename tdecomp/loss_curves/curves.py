"""The ranks of a layer worth considering, method by method, and what each of them loses."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.interpolate import PchipInterpolator

from tdecomp.decomposers.base import DRAFT_ITERATIONS, Decomposer
from tdecomp.layers.chain import Rank
from tdecomp.layers.cost import Cost
from tdecomp.loss_curves.layer_losses import LayerLosses, Lost, only_rank
from tdecomp.ranks.base import LARGEST_SHARE, Option
from tdecomp.ranks.grid import ANY_RANK, Rounding, rank_steps
from tdecomp.torch_state import undisturbed

# The share of the largest cost worth considering at which an iterative method is fitted first, to
# see whether it is worth fitting at the ends of its ladder of ranks, too: a method that loses so
# many times as much as another one does at about that cost is not.
_PROBE = 1 / 3
_ABOUT = 1.15
_HOPELESS = 1.05
# How much more of the cost a method may take that contains another one, for the other to be
# pointless beside it.
_AS_CHEAP = 1.02
# The smallest rank of a ladder, as a share of the largest that pays.
_SMALLEST = 0.06
# Ranks that become options, fitted or in between.
_OPTIONS = 48
# Losses below this share of the whole count as this much, so that logarithms exist.
_LEAST = 1e-12


@dataclass
class RankOptions:
    """What a selector that weighs layers may choose from for one layer.

    Attributes
    ----------
    losses : LayerLosses
    methods : sequence of Decomposer
        All that are to be chosen from.
    largest_share : float
        Of the layer's own cost, that a rank may keep to be worth an iterative fit.
    rounding : Rounding
        The multiples that ranks shall be of.
    """

    losses: LayerLosses
    methods: Sequence[Decomposer]
    largest_share: float = LARGEST_SHARE
    rounding: Rounding = ANY_RANK
    _curves: dict[str, "_Curve"] = field(default_factory=dict)

    def options(self, decomposer: Decomposer) -> list[Option]:
        """The ranks worth considering, those that save something."""
        with undisturbed(self.losses.weight.device):
            mine = self.curve(decomposer)
            if mine.hopeless or mine.hopeless_beside(self.curve(other) for other in self.methods):
                return []
            mine.complete()
            return mine.options()

    def curve(self, decomposer: Decomposer) -> "_Curve":
        if decomposer.name not in self._curves:
            self._curves[decomposer.name] = _Curve(self, decomposer)
        return self._curves[decomposer.name]

    def ladder(self, decomposer: Decomposer) -> list[Rank]:
        """Ranks from a small one to one that nearly costs the layer, on a log scale."""
        nested = self.losses.nested(decomposer) is not None
        share = LARGEST_SHARE if nested else self.largest_share
        return rank_steps(
            decomposer.max_rank(self.losses.spec),
            self.losses.cost(decomposer),
            share * self.losses.before.deciding,
            0.0 if nested else _SMALLEST,
            _OPTIONS,
            self.rounding,
        )

    def contained(self, decomposer: Decomposer) -> bool:
        """Whether another of the methods loses no more at about the same cost, rank by rank."""
        limit = _AS_CHEAP * self._cost_of_one(decomposer)
        within = decomposer.contained_in(self.losses.spec)
        return any(d.name in within and self._cost_of_one(d) <= limit for d in self.methods)

    def _cost_of_one(self, decomposer: Decomposer) -> int:
        largest = decomposer.max_rank(self.losses.spec)
        least: Rank = (1,) * len(largest) if isinstance(largest, tuple) else 1
        return self.losses.cost(decomposer)(least).deciding


class _Curve:
    """Loss and error over the ladder of one method's ranks."""

    def __init__(self, offers: "RankOptions", decomposer: Decomposer) -> None:
        self._offers, self._losses, self._decomposer = offers, offers.losses, decomposer
        self._ranks: list[Rank] = []
        self._costs: list[Cost] = []
        self._known: dict[int, Lost] = {}
        self._probe = 0
        self.hopeless = offers.contained(decomposer)
        if not self.hopeless:
            self._begin()

    def _begin(self) -> None:
        """All losses of a nested method; of others the one that tells whether they are worth it."""
        losses, decomposer = self._losses, self._decomposer
        self._ranks = self._offers.ladder(decomposer)
        self._costs = [losses.cost(decomposer)(rank) for rank in self._ranks]
        nested = losses.nested(decomposer)
        if nested is not None:
            self._known = {i: nested[only_rank(rank)] for i, rank in enumerate(self._ranks)}
        elif self._ranks:
            wanted = _PROBE * self._offers.largest_share * losses.before.deciding
            gaps = [abs(cost.deciding - wanted) for cost in self._costs]
            self._probe = gaps.index(min(gaps))
            self.hopeless = self._hopeless_unseen()
            if not self.hopeless:
                self._fit(self._probe)

    def _hopeless_unseen(self) -> bool:
        """Whether singular values say so without a fit, beside methods that need none either."""
        losses, offers, probe = self._losses, self._offers, self._probe
        worthwhile = (other for other in offers.methods if not offers.contained(other))
        nested = [other for other in worthwhile if losses.nested(other) is not None]
        least = losses.least(self._decomposer, self._ranks[probe]) if nested else None
        return least is not None and any(
            least > _HOPELESS * offers.curve(other).least_at(self._costs[probe]) for other in nested
        )

    def _fit(self, i: int) -> None:
        if i not in self._known:
            self._known[i] = self._losses.fit(
                self._decomposer.brief(DRAFT_ITERATIONS), self._ranks[i]
            )

    def hopeless_beside(self, others: Iterable["_Curve"]) -> bool:
        """Whether, where it was fitted, another method loses far less at about that cost."""
        return bool(self._ranks) and any(
            all(
                loss > _HOPELESS * other.least_at(self._costs[i])
                for i, (loss, _) in self._known.items()
            )
            for other in others
            if other is not self
        )

    def least_at(self, cost: Cost) -> float:
        """The least loss of the ranks fitted so far that cost about as much or less."""
        limit = _ABOUT * cost.deciding
        affordable = [i for i in self._known if self._costs[i].deciding <= limit]
        return min((self._known[i][0] for i in affordable), default=math.inf)

    def complete(self) -> None:
        """Fit at both ends, too, or foresee what the dear one loses."""
        if self._ranks:
            self._fit(0)
            if not self._foreseen():
                self._fit(len(self._ranks) - 1)

    def _foreseen(self) -> bool:
        """Fill in the ranks beyond the probe, if the fits at it and below tell what they lose.

        Where a chain of as many weights as the layer loses nothing, the error falls about as
        ``share**-b * (1 - share)``, of the share of the weights: on trained and on Gaussian
        kernels within some hundredths at half of them, a tenth or two at four fifths.
        """
        losses, decomposer, probe = self._losses, self._decomposer, self._probe
        if losses.fits_to_data(decomposer) or not decomposer.exact_at_parity(losses.spec):
            return False
        shares = np.array([cost.params / losses.before.params for cost in self._costs])
        (_, low), (loss, error) = self._known[0], self._known[probe]
        if not (shares[0] < shares[probe] and shares[-1] < 1 and 0 < error < low < math.inf):
            return False
        known = np.log([low, error]) - 2 * np.log1p(-shares[[0, probe]])
        slope = np.diff(known) / np.diff(np.log(shares[[0, probe]]))
        foreseen = known[1] + slope * np.log(shares / shares[probe]) + 2 * np.log1p(-shares)
        for i, value in enumerate(np.exp(foreseen).tolist()):
            if i > probe:
                self._known[i] = loss / error * value, value
        return True

    def options(self) -> list[Option]:
        """The ranks from one fit to another, those between by interpolation on a log-log scale."""
        places = sorted(i for i, (loss, _) in self._known.items() if math.isfinite(loss))
        if not places:
            return []
        sizes = np.log([_size(rank) for rank in self._ranks])
        lines = []
        for values in zip(*(self._known[i] for i in places), strict=True):
            # A larger rank never has to lose more.
            falling = np.log(np.minimum.accumulate(np.maximum(values, _LEAST)))
            if len(places) > 2:
                lines.append(np.exp(PchipInterpolator(sizes[places], falling)(sizes)))
            else:
                lines.append(np.exp(np.interp(sizes, sizes[places], falling)))
        everything = [
            Option(rank, cost, float(loss), self._losses.row_error(self._decomposer, float(error)))
            for rank, cost, loss, error in zip(self._ranks, self._costs, *lines, strict=True)
        ]
        return everything[places[0] : places[-1] + 1]


def _size(rank: Rank) -> int:
    return math.prod(rank) if isinstance(rank, tuple) else rank
