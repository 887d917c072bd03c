"""What each rank of a method would lose on a layer, for selectors that weigh layers."""

import math
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tdecomp.chain import Rank
from tdecomp.cost import Cost
from tdecomp.decomposers.base import Decomposer
from tdecomp.layer import LayerSpec
from tdecomp.linalg import undisturbed
from tdecomp.moments import LayerMoments
from tdecomp.ranks.base import Option

# Ranks at which an iterative method is fitted, as shares of the largest one that pays.
_LADDER = (0.06, 0.15, 0.33, 0.6, 0.95)
# Ranks that become options, fitted or in between.
_OPTIONS = 48
# Losses below this share of the whole count as this much, so that logarithms exist.
_LEAST = 1e-12

Lost = tuple[float, float]  # the loss, comparable over layers, and the layer's own relative error


@dataclass
class LayerLosses:
    """What the ranks of one layer lose, fitted at most once each.

    Attributes
    ----------
    weight : Parameter
    spec : LayerSpec
    moments : LayerMoments or None
        Without them the norm is that of the weights.
    unit : float
        What losing the whole output of a layer without known gradients counts for.
    cache : mutable mapping
        Of fits already made, e.g. for another budget.
    """

    weight: nn.Parameter
    spec: LayerSpec
    moments: LayerMoments | None
    unit: float = 1.0
    cache: MutableMapping[Any, Any] = field(default_factory=dict)

    def options(
        self, decomposer: Decomposer, cost: Callable[[Rank], Cost], before: Cost
    ) -> list[Option]:
        """The ranks worth considering, those that save something."""
        with undisturbed(self.weight.device):
            nested = self._nested(decomposer)
            largest = decomposer.max_rank(self.spec)
            if isinstance(largest, int):
                paying = _largest_paying(largest, cost, before)
                ranks: Sequence[Rank] = _spaced(1 if nested else math.ceil(0.06 * paying), paying)
            else:
                ranks = [r for r in _descent(largest, cost) if cost(r).deciding < before.deciding]
                ranks = [ranks[i - 1] for i in _spaced(1, len(ranks))]
            if not ranks:
                return []
            lost = [nested[_only(r)] for r in ranks] if nested else self._fitted(decomposer, ranks)
        return [
            Option(rank, cost(rank), loss, error)
            for rank, (loss, error) in zip(ranks, lost, strict=True)
        ]

    def expected_error(self, decomposer: Decomposer, rank: Rank) -> float | None:
        """What the row of a plan expects: exact for nested methods, else a bound or None.

        With moments the share of the output's variance, without the relative error of the weight.
        """
        with undisturbed(self.weight.device):
            nested = self._nested(decomposer)
            if nested is not None:
                error = nested[_only(rank)][1]
                return error if self._by_moments(decomposer) else math.sqrt(error)
            if not isinstance(rank, tuple):
                return None
            if self._by_moments(decomposer):
                return self._fit(decomposer.draft(), rank)[1]  # what a few iterations reach
            spectra = decomposer.spectra(self.weight, self.spec)
        if spectra is None:
            return None
        tails = [
            float(np.clip(s.squares[:, r:], 0.0, None).sum() / (s.squares.sum() or 1.0))
            for s, r in zip(spectra, rank, strict=True)
        ]
        # De Lathauwer et al. 2000, "A multilinear singular value decomposition", property 10.
        return math.sqrt(min(sum(tails), 1.0))

    def _by_moments(self, decomposer: Decomposer) -> bool:
        return self.moments is not None and decomposer.uses_moments

    def _importance(self) -> Tensor | None:
        return None if self.moments is None else self.moments.gradient

    def _variance(self) -> float:
        """What the errors are a share of."""
        if self.moments is not None:
            return self.moments.output_variance(self.weight)
        return float(self.weight.detach().double().square().sum())

    def _nested(self, decomposer: Decomposer) -> list[Lost] | None:
        """Loss and error at rank 0, 1, 2 …, of a method whose best fits are nested."""
        key = (decomposer, "nested")
        if key not in self.cache:
            self.cache[key] = self._nested_now(decomposer)
        found: list[Lost] | None = self.cache[key]
        return found

    def _nested_now(self, decomposer: Decomposer) -> list[Lost] | None:
        kernels = decomposer.group_kernels(self.weight.detach().double(), self.spec)
        use = self._by_moments(decomposer) and self.moments is not None
        moments = self.moments.second_moments() if use and self.moments else [None] * len(kernels)
        importance = self._importance() if use else None
        blocks: Sequence[Tensor | None] = [None] * len(kernels)
        if importance is not None:
            out = self.spec.group_out
            blocks = [
                importance[g * out : (g + 1) * out, g * out : (g + 1) * out]
                for g in range(self.spec.groups)
            ]
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
        variance = self._variance() if use else float(plain[0])
        errors = (plain / (variance or 1.0)).tolist()
        if importance is None:
            return [(self.unit * error, error) for error in errors]
        assert isinstance(weighted, Tensor)
        return list(zip(weighted.tolist(), errors, strict=True))

    def _fitted(self, decomposer: Decomposer, ranks: Sequence[Rank]) -> list[Lost]:
        """Fits at a few of these ranks, and what lies between them on a log-log scale."""
        draft = decomposer.draft()
        steps = sorted({max(0, round(share * len(ranks)) - 1) for share in _LADDER})
        if isinstance(ranks[0], int):
            top = _only(ranks[-1])
            steps = sorted({_nearest(ranks, share * top) for share in _LADDER} | {0})
        known = [self._fit(draft, ranks[i]) for i in steps]
        sizes = np.log([_size(rank) for rank in ranks])
        lines = []
        for values in zip(*known, strict=True):
            # A larger rank never has to lose more.
            falling = np.minimum.accumulate(np.maximum(values, _LEAST))
            lines.append(np.exp(np.interp(sizes, sizes[steps], np.log(falling))))
        return list(zip(lines[0].tolist(), lines[1].tolist(), strict=True))

    def _fit(self, decomposer: Decomposer, rank: Rank) -> Lost:
        key = (decomposer, rank)
        if key not in self.cache:
            self.cache[key] = self._fit_now(decomposer, rank)
        lost: Lost = self.cache[key]
        return lost

    def _fit_now(self, decomposer: Decomposer, rank: Rank) -> Lost:
        by_moments = self.moments if self._by_moments(decomposer) else None
        second = None if by_moments is None else by_moments.second_moments()
        try:
            fitted = decomposer.factorize(self.weight, self.spec, rank, second)
        except (ValueError, torch.linalg.LinAlgError):
            return self.unit, 1.0  # a fit that fails is no option
        approximation = fitted.to(torch.float64).to_kernel()
        if by_moments is None or second is None:
            whole = self._variance() if self.moments is None else float(self.weight.square().sum())
            gone = (self.weight.detach().double() - approximation).square().sum()
            error = float(gone) / (whole or 1.0)
            return self.unit * error, error
        error = by_moments.output_error(self.weight, approximation)
        if by_moments.gradient is None:
            return self.unit * error, error
        difference = by_moments.kernels(self.weight.detach().double() - approximation)
        out = self.spec.group_out
        loss = 0.0
        for g, (moment, gone) in enumerate(zip(second, difference, strict=True)):
            block = by_moments.gradient[g * out : (g + 1) * out, g * out : (g + 1) * out]
            loss += float((block * (moment.applied(gone) @ gone.T)).sum())
        return max(loss, 0.0), error


def whole_loss(weight: nn.Parameter, moments: LayerMoments) -> float | None:
    """The loss of a layer's whole output, or None where its gradients are not known."""
    if moments.gradient is None:
        return None
    out, loss = moments.spec.group_out, 0.0
    pairs = zip(moments.second_moments(), moments.kernels(weight), strict=True)
    for g, (moment, kernel) in enumerate(pairs):
        block = moments.gradient[g * out : (g + 1) * out, g * out : (g + 1) * out]
        loss += float((block * moment.between(kernel)).sum())
    return loss


def _only(rank: Rank) -> int:
    assert isinstance(rank, int)
    return rank


def _size(rank: Rank) -> int:
    return math.prod(rank) if isinstance(rank, tuple) else rank


def _nearest(ranks: Sequence[Rank], wanted: float) -> int:
    return min(range(len(ranks)), key=lambda i: abs(_only(ranks[i]) - wanted))


def _largest_paying(largest: int, cost: Callable[[Rank], Cost], before: Cost) -> int:
    low, high = 0, largest
    while low < high:
        middle = (low + high + 1) // 2
        if cost(middle).deciding < before.deciding:
            low = middle
        else:
            high = middle - 1
    return low


def _spaced(low: int, high: int) -> list[int]:
    """At most so many whole numbers from `low` to `high`, evenly spaced on a log scale."""
    if high < 1:
        return []
    low = max(1, min(low, high))
    return sorted({round(x) for x in np.geomspace(low, high, _OPTIONS).tolist()})


def _descent(largest: tuple[int, ...], cost: Callable[[Rank], Cost]) -> list[Rank]:
    """Ranks from the smallest to the largest, along a common fraction."""
    fractions = np.geomspace(1 / max(largest), 1.0, 2 * _OPTIONS).tolist()
    ranks: dict[Rank, None] = {}
    for fraction in fractions:
        ranks[tuple(max(1, round(fraction * limit)) for limit in largest)] = None
    return sorted(ranks, key=lambda rank: cost(rank).deciding)
