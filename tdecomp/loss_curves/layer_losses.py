"""What ranks of a method would lose on a layer, by fits or by singular values."""

import math
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tdecomp.calibration.layer_moments import LayerMoments
from tdecomp.decomposers.base import DRAFT_ITERATIONS, Decomposer
from tdecomp.layers.chain import Rank
from tdecomp.layers.cost import Cost, chain_cost
from tdecomp.layers.spec import Call, LayerSpec
from tdecomp.linalg.second_moment import SecondMoment
from tdecomp.linalg.spectrum import Spectrum
from tdecomp.torch_state import undisturbed

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
    unit : float
        What losing the whole output of a layer without known gradients counts for.
    cache : mutable mapping
        Of fits already made, e.g. for another budget.
    """

    weight: nn.Parameter
    spec: LayerSpec
    moments: LayerMoments | None
    calls: Sequence[Call] | None = None
    unit: float = 1.0
    cache: MutableMapping[Any, Any] = field(default_factory=dict)
    _spectra: dict[str, tuple[Spectrum, ...] | None] = field(default_factory=dict)
    _costs: dict[str, Callable[[Rank], Cost]] = field(default_factory=dict)

    def cost(self, decomposer: Decomposer) -> Callable[[Rank], Cost]:
        """What a rank costs on the calls that were observed."""
        if decomposer.name not in self._costs:
            self._costs[decomposer.name] = cache(
                lambda rank: chain_cost(decomposer.stages(self.spec, rank), self.calls)
            )
        return self._costs[decomposer.name]

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
                return self.row_error(decomposer, nested[only_rank(rank)][1])
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


def only_rank(rank: Rank) -> int:
    """The rank of a method that has a single one, as all nested methods have."""
    assert isinstance(rank, int)
    return rank
