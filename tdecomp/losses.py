"""What each rank of a method would lose on a layer, for selectors that weigh layers."""

import math
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor, nn

from tdecomp.chain import Rank
from tdecomp.cost import Cost, chain_cost
from tdecomp.decomposers.base import DRAFT_ITERATIONS, Decomposer
from tdecomp.layer import Call, LayerSpec
from tdecomp.linalg import Spectrum, undisturbed
from tdecomp.moments import LayerMoments
from tdecomp.ranks.base import LARGEST_SHARE, Option
from tdecomp.ranks.ladder import ANY_RANK, Rounding, rank_steps
from tdecomp.regression import SecondMoment

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

# The loss weighted by gradients (None where they are not known), and the layer's own share of its
# output's variance or of its squared weights.
Measured = tuple[float | None, float]
Lost = tuple[float, float]  # the loss, comparable over layers, and the same share
# A fit that failed: no option at any price.
_FAILED: Measured = (math.inf, math.inf)


@dataclass
class LayerLosses:
    """What the ranks of one layer lose, fitted at most once each.

    Attributes
    ----------
    weight : Parameter
    spec : LayerSpec
    moments : LayerMoments or None
        Without them the norm is that of the weights.
    calls : sequence of Call or None
        What one pass of the example inputs asks of the layer.
    rivals : sequence of Decomposer
        All methods that are to be chosen from.
    largest_share : float
        Of the layer's own cost, that a rank may keep to be worth an iterative fit.
    unit : float
        What losing the whole output of a layer without known gradients counts for.
    rounding : Rounding
        The multiples that ranks shall be of.
    cache : mutable mapping
        Of fits already made, e.g. for another budget.
    """

    weight: nn.Parameter
    spec: LayerSpec
    moments: LayerMoments | None
    calls: Sequence[Call] | None = None
    rivals: Sequence[Decomposer] = ()
    largest_share: float = LARGEST_SHARE
    unit: float = 1.0
    rounding: Rounding = ANY_RANK
    cache: MutableMapping[Any, Any] = field(default_factory=dict)
    _curves: dict[str, "_Curve"] = field(default_factory=dict)
    _spectra: dict[str, tuple[Spectrum, ...] | None] = field(default_factory=dict)
    _costs: dict[str, Callable[[Rank], Cost]] = field(default_factory=dict)

    def options(self, decomposer: Decomposer) -> list[Option]:
        """The ranks worth considering, those that save something."""
        with undisturbed(self.weight.device):
            mine = self.curve(decomposer)
            if mine.hopeless or mine.hopeless_beside(self.curve(other) for other in self.rivals):
                return []
            mine.complete()
            return mine.options()

    def curve(self, decomposer: Decomposer) -> "_Curve":
        if decomposer.name not in self._curves:
            self._curves[decomposer.name] = _Curve(self, decomposer)
        return self._curves[decomposer.name]

    def ladder(self, decomposer: Decomposer) -> list[Rank]:
        """Ranks from a small one to one that nearly costs the layer, on a log scale."""
        nested = self.nested(decomposer) is not None
        share = LARGEST_SHARE if nested else self.largest_share
        return rank_steps(
            decomposer.max_rank(self.spec),
            self.cost(decomposer),
            share * self.before.deciding,
            0.0 if nested else _SMALLEST,
            _OPTIONS,
            self.rounding,
        )

    def cost(self, decomposer: Decomposer) -> Callable[[Rank], Cost]:
        """What a rank costs on the calls that were observed."""
        if decomposer.name not in self._costs:
            self._costs[decomposer.name] = cache(
                lambda rank: chain_cost(decomposer.stages(self.spec, rank), self.calls)
            )
        return self._costs[decomposer.name]

    def contained(self, decomposer: Decomposer) -> bool:
        """Whether another of the methods loses no more at about the same cost, rank by rank."""
        limit = _AS_CHEAP * self._cost_of_one(decomposer)
        within = decomposer.contained_in(self.spec)
        return any(d.name in within and self._cost_of_one(d) <= limit for d in self.rivals)

    def _cost_of_one(self, decomposer: Decomposer) -> int:
        largest = decomposer.max_rank(self.spec)
        least: Rank = (1,) * len(largest) if isinstance(largest, tuple) else 1
        return self.cost(decomposer)(least).deciding

    @property
    def before(self) -> Cost:
        """Of the layer as it is."""
        return chain_cost([self.spec], self.calls)

    def expected_error(self, decomposer: Decomposer, rank: Rank) -> float | None:
        """What the row of a plan expects: exact for nested methods, else a bound or None.

        With moments the share of the output's variance, without the relative error of the weight.
        """
        with undisturbed(self.weight.device):
            nested = self.nested(decomposer)
            if nested is not None:
                return self.row_error(decomposer, nested[_only(rank)][1])
            if not isinstance(rank, tuple):
                return None
            if self.fits_to_data(decomposer):
                # What a few iterations reach.
                return self.fit(decomposer.brief(DRAFT_ITERATIONS), rank)[1]
            outside = self._outside(decomposer, rank)
        # De Lathauwer et al. 2000, "A multilinear singular value decomposition", property 10.
        return None if outside is None else math.sqrt(min(sum(outside), 1.0))

    def least(self, decomposer: Decomposer, rank: Rank) -> float | None:
        """What no fit of these ranks can lose less than, where singular values tell; or None."""
        if self.fits_to_data(decomposer) or not isinstance(rank, tuple):
            return None
        outside = self._outside(decomposer, rank)
        return None if outside is None else self.unit * max(outside)

    def _outside(self, decomposer: Decomposer, rank: tuple[int, ...]) -> list[float] | None:
        """For each rank the share of the squared weights beyond it."""
        spectra = self.spectra(decomposer)
        if spectra is None:
            return None
        return [
            float(np.clip(s.squares[:, r:], 0.0, None).sum() / (s.squares.sum() or 1.0))
            for s, r in zip(spectra, rank, strict=True)
        ]

    def spectra(self, decomposer: Decomposer) -> tuple[Spectrum, ...] | None:
        """The decomposer's spectra of this weight, computed once."""
        if decomposer.name not in self._spectra:
            self._spectra[decomposer.name] = decomposer.spectra(self.weight, self.spec)
        return self._spectra[decomposer.name]

    def row_error(self, decomposer: Decomposer, share: float) -> float:
        """A share as a row has it: of the outputs' variance as it is, of squared weights the root.

        The one is a row's ``output_error``, the other its ``weight_error``.
        """
        return share if self.fits_to_data(decomposer) else math.sqrt(share)

    def fits_to_data(self, decomposer: Decomposer) -> bool:
        """Whether a method's losses are those of outputs, not of weights."""
        return self.moments is not None and decomposer.uses_moments

    def nested(self, decomposer: Decomposer) -> list[Lost] | None:
        """Loss and error at rank 0, 1, 2 …, of a method whose best fits are nested."""
        key = (*_key(decomposer), "nested")
        if key not in self.cache:
            self.cache[key] = self._nested_now(decomposer)
        found: list[Measured] | None = self.cache[key]
        return None if found is None else [self._in_unit(measured) for measured in found]

    def _in_unit(self, measured: Measured) -> Lost:
        # Not kept: with other layers left alone the unit is another one.
        loss, error = measured
        return self.unit * error if loss is None else loss, error

    def _nested_now(self, decomposer: Decomposer) -> list[Measured] | None:
        kernels = decomposer.group_kernels(self.weight.detach().double(), self.spec)
        use = self.fits_to_data(decomposer) and self.moments is not None
        moments = self._second if use else [None] * len(kernels)
        importance = self.moments.gradient_blocks() if use and self.moments is not None else None
        blocks: Sequence[Tensor | None] = importance or [None] * len(kernels)
        plain: Tensor | float = 0.0
        weighted: Tensor | float = 0.0
        for kernel, moment, block in zip(kernels, moments, blocks, strict=True):
            lost = decomposer.lost_at_every_rank(kernel, moment)
            if lost is None:
                return None
            plain = plain + lost
            if block is not None:
                weighed = decomposer.lost_at_every_rank(kernel, moment, block)
                assert weighed is not None
                weighted = weighted + weighed
        assert isinstance(plain, Tensor)
        variance = float(plain[0])
        if use and self.moments is not None:
            variance = self._variance
        errors = (plain / (variance or 1.0)).tolist()
        if importance is None:
            return [(None, error) for error in errors]
        assert isinstance(weighted, Tensor)
        return list(zip(weighted.tolist(), errors, strict=True))

    def fit(self, decomposer: Decomposer, rank: Rank) -> Lost:
        key = (*_key(decomposer), rank)
        if key not in self.cache:
            self.cache[key] = self._fit_now(decomposer, rank)
        return self._in_unit(self.cache[key])

    def _fit_now(self, decomposer: Decomposer, rank: Rank) -> Measured:
        by_moments = self.moments if self.fits_to_data(decomposer) else None
        second = None if by_moments is None else self._second
        try:
            fitted = decomposer.factorize(self.weight, self.spec, rank, second)
        except (ValueError, torch.linalg.LinAlgError):
            return _FAILED
        approximation = fitted.to(torch.float64).to_kernel()
        if by_moments is None or second is None:
            weight = self.weight.detach().double()
            lost = float((weight - approximation).square().sum())
            return None, lost / (float(weight.square().sum()) or 1.0)
        difference = by_moments.kernels(self.weight.detach().double() - approximation)
        outputs = [m.between(gone) for m, gone in zip(second, difference, strict=True)]  # of errors
        lost = sum(float(group.trace()) for group in outputs)
        error = lost / self._variance if self._variance > 0 else float(lost > 0)
        blocks = by_moments.gradient_blocks()
        if blocks is None:
            return None, error
        loss = sum(float((b * group).sum()) for b, group in zip(blocks, outputs, strict=True))
        return max(loss, 0.0), error

    @cached_property
    def _second(self) -> list[SecondMoment]:
        assert self.moments is not None
        return self.moments.second_moments()

    @cached_property
    def _variance(self) -> float:
        assert self.moments is not None
        return self.moments.output_variance(self.weight)


class _Curve:
    """Loss and error over the ladder of one method's ranks."""

    def __init__(self, losses: LayerLosses, decomposer: Decomposer) -> None:
        self._losses, self._decomposer = losses, decomposer
        self._ranks: list[Rank] = []
        self._costs: list[Cost] = []
        self._known: dict[int, Lost] = {}
        self._probe = 0
        self.hopeless = losses.contained(decomposer)
        if not self.hopeless:
            self._begin()

    def _begin(self) -> None:
        """All losses of a nested method; of others the one that tells whether they are worth it."""
        losses, decomposer = self._losses, self._decomposer
        self._ranks = losses.ladder(decomposer)
        self._costs = [losses.cost(decomposer)(rank) for rank in self._ranks]
        nested = losses.nested(decomposer)
        if nested is not None:
            self._known = {i: nested[_only(rank)] for i, rank in enumerate(self._ranks)}
        elif self._ranks:
            wanted = _PROBE * losses.largest_share * losses.before.deciding
            gaps = [abs(cost.deciding - wanted) for cost in self._costs]
            self._probe = gaps.index(min(gaps))
            self.hopeless = self._hopeless_unseen(self._probe)
            if not self.hopeless:
                self._fit(self._probe)

    def _hopeless_unseen(self, probe: int) -> bool:
        """Whether singular values say so without a fit, beside methods that need none either."""
        losses = self._losses
        worthwhile = (other for other in losses.rivals if not losses.contained(other))
        nested = [other for other in worthwhile if losses.nested(other) is not None]
        least = losses.least(self._decomposer, self._ranks[probe]) if nested else None
        return least is not None and any(
            least > _HOPELESS * losses.curve(other).least_at(self._costs[probe]) for other in nested
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


def whole_loss(weight: nn.Parameter, moments: LayerMoments) -> float | None:
    """The loss of a layer's whole output, or None where its gradients are not known."""
    blocks = moments.gradient_blocks()
    if blocks is None:
        return None
    groups = zip(blocks, moments.second_moments(), moments.kernels(weight), strict=True)
    return sum(float((block * moment.between(k)).sum()) for block, moment, k in groups)


def _key(decomposer: Decomposer) -> tuple[str, str]:
    # With its options. Decomposers need not be hashable.
    return decomposer.name, repr(decomposer)


def _only(rank: Rank) -> int:
    assert isinstance(rank, int)
    return rank


def _size(rank: Rank) -> int:
    return math.prod(rank) if isinstance(rank, tuple) else rank
