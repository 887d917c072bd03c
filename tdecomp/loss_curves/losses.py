"""What one rank of one method loses on one layer: by singular values, or by a draft."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tdecomp.calibration.fit_cache import LayerFits
from tdecomp.calibration.layer_moments import LayerMoments
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.fit_layer import (
    FittedLayer,
    fit_layer,
    fit_size,
    fit_to_dtype,
    group_kernels,
    spectra_of,
)
from tdecomp.decomposers.tied import Member, group_cost
from tdecomp.layers.chain import Rank
from tdecomp.layers.cost import Cost, chain_cost
from tdecomp.layers.geometry import Call
from tdecomp.layers.spec import LayerSpec
from tdecomp.linalg.second_moment import SecondMoment
from tdecomp.linalg.spectrum import Spectrum
from tdecomp.loss_curves.measured import KnownRanks, Lost, Measured
from tdecomp.ranks.base import as_tuple
from tdecomp.runtime.torch_state import full_precision

Value = TypeVar("Value")


@dataclass(frozen=True)
class LayerLosses:
    """What the ranks of one layer lose; plain data, which can be pickled."""

    weight: Tensor
    spec: LayerSpec
    moments: LayerMoments | None = None  # None: losses are those of the weights
    calls: tuple[Call, ...] | None = None  # in one pass of the example inputs
    unit: float = 1.0  # the loss of the whole output, for a layer whose gradients are not known
    cache: LayerFits = field(default_factory=LayerFits)
    group: tuple[Member, ...] = ()  # the layers that are to share its factors, itself included

    def cost(self, method: Decomposer, rank: Rank) -> Cost:
        """The cost of the chain on the observed calls."""
        key = key_of(method, ("cost", rank, self.calls, self.group))
        return self.cache.get(key, lambda: group_cost(method, rank, self._members), cheap=True)

    @property
    def _members(self) -> tuple[Member, ...]:
        return self.group or ((self.spec, self.calls),)

    def saves_work(self, method: Decomposer, rank: Rank) -> bool:
        """Whether a chain in place of a Linear does less for each input, if only calls tell more.

        A chain that uses its weights several times may have fewer of them, and do more.
        """
        if self.calls or self.spec.ndim:
            return True
        once = (Call(1),)
        chain = chain_cost(method.stages(self.spec, rank), once)
        return chain.amount < chain_cost([self.spec], once).amount

    def _cached(self, method: Decomposer, what: Hashable, compute: Callable[[], Value]) -> Value:
        return self.cache.get(key_of(method, what), compute)

    @property
    def work(self) -> int:
        """How many numbers a fit of this layer works on; 0 where a GPU does the work."""
        return fit_size(self.weight, self.spec, self.moments)

    @cached_property
    def before(self) -> Cost:
        """The cost of the layer as it is."""
        return group_cost(None, 0, self._members)

    def expected_error(self, method: Decomposer, rank: Rank) -> float | None:
        """The error in a plan's row: exact for nested methods and where the fit itself is known.

        Else a bound or a draft's; or None. With moments the lost share of the output's variance, on
        held-out samples where there are some; without the relative weight error.
        """
        error = self._error_of_fit(method, rank) if self.fits_to_data(method) else None
        if error is not None:
            return error
        nested, several = self.nested(method), self._known_ranks(method)
        if nested is not None:
            return self.row_error(method, nested[only_rank(rank)][1])
        if several is not None:
            return self.row_error(method, several.share(rank))
        outside = self._outside(method, rank)
        # De Lathauwer et al. 2000, "A multilinear singular value decomposition", property 10.
        return None if outside is None else math.sqrt(min(sum(outside), 1.0))

    def _error_of_fit(self, method: Decomposer, rank: Rank) -> float | None:
        """Of the fit, or the draft, that is known; else of one made now and not kept.

        The fits of many layers take as much memory as these. None for methods of one rank of which
        no fit is exact.
        """

        def error_of(fit: FittedLayer | None) -> float | None:
            error = None if fit is None else fit.held_out_error(self.weight, self.moments)
            return None if error is None else error.value

        exact = self._is_exact(method)
        for draft in (False,) if exact else (False, True):
            if (fit := self.known_fit(method, rank, draft=draft)) is not None:
                return error_of(fit)
        if not exact and not isinstance(rank, tuple):
            return None
        return self._cached(
            method, ("error", rank), lambda: error_of(self._fit_now(method, rank, draft=not exact))
        )

    def _is_exact(self, method: Decomposer) -> bool:
        """Whether one fit, which is no draft, tells what there is to know of a rank."""
        if not method.knows_losses:
            return False
        return not method.iterative or self.nested(method) is not None

    def least(self, method: Decomposer, rank: Rank) -> float | None:
        """A lower bound on the loss of any fit of these ranks, from singular values; or None."""
        outside = self._outside(method, rank)
        return None if outside is None else self.unit * max(outside)

    def _outside(self, method: Decomposer, rank: Rank) -> list[float] | None:
        """For each of several ranks the share of the squared weights beyond it; else None."""
        if self.fits_to_data(method) or not isinstance(rank, tuple):
            return None
        spectra = self.spectra(method)
        if spectra is None:
            return None
        return [
            float(np.clip(s.squares[:, r:], 0.0, None).sum() / (s.squares.sum() or 1.0))
            for s, r in zip(spectra, rank, strict=True)
        ]

    def spectra(self, method: Decomposer) -> tuple[Spectrum, ...] | None:
        """The method's spectra of this weight."""
        return self._cached(method, "spectra", lambda: spectra_of(method, self.weight, self.spec))

    def row_error(self, method: Decomposer, share: float) -> float:
        """A row's `output_error` is the share itself; its `weight_error` is the square root."""
        return share if self.fits_to_data(method) else math.sqrt(share)

    def fits_to_data(self, method: Decomposer) -> bool:
        """Whether the losses of this method are those of outputs, not of weights."""
        return self.moments is not None and method.uses_moments

    def learns_a_sample(self, method: Decomposer) -> bool:
        """Whether a fit of many weights would be to a sample of fewer patches than inputs."""
        sampled = self.moments is not None and self.moments.sampled
        return sampled and method.iterative and self.fits_to_data(method)

    def nested(self, method: Decomposer) -> list[Lost] | None:
        """Loss and share at rank 0, 1, 2 …, of a method whose best fits are nested; else None."""
        found = self._cached(method, "nested", lambda: self._nested_now(method))
        return None if found is None else list(map(self._in_unit, found))

    def best_ranks(self, method: Decomposer, steps: Sequence[int]) -> dict[Rank, Lost] | None:
        """Loss and share of the ranks that lose least together, ascending, in these steps.

        None for methods of which only fits tell them.
        """
        known = self._known_ranks(method, steps)
        return None if known is None else {r: self._in_unit(m) for r, m in known.measured.items()}

    def errors_of_best_ranks(self, method: Decomposer) -> dict[Rank, float] | None:
        """The errors in rows of these ranks; None for methods of which only fits tell them."""
        known = self._known_ranks(method)
        if known is None:
            return None
        return {rank: self.row_error(method, share) for rank, (_, share) in known.measured.items()}

    def _known_ranks(self, method: Decomposer, steps: Sequence[int] = ()) -> KnownRanks | None:
        if not method.knows_best_ranks or self.spec.groups > 1:
            return None
        steps = tuple(steps) or (1,) * len(as_tuple(method.max_rank(self.spec)))
        what = ("best ranks", steps)
        return self._cached(method, what, lambda: self._known_ranks_now(method, steps))

    def fitted(self, method: Decomposer, rank: Rank, *, draft: bool = True) -> Lost:
        """Loss and share of a fit at this rank; infinite if the fit fails."""
        fit = self.fit(method, rank, draft=draft)
        if fit is None:
            return math.inf, math.inf
        if not self.fits_to_data(method):
            return self._in_unit((None, fit.weight_error**2))
        assert fit.output_error is not None
        return self._in_unit((fit.loss, fit.output_error))

    def nested_errors(self, method: Decomposer) -> list[float] | None:
        """The errors in rows at rank 0, 1, 2 …; None for a method whose fits are not nested."""
        nested = self.nested(method)
        return None if nested is None else [self.row_error(method, share) for _, share in nested]

    def error_at(self, method: Decomposer, rank: Rank) -> float:
        """The error in a row of a fit that is no draft; infinite if the fit fails."""
        return self.row_error(method, self.fitted(method, rank, draft=False)[1])

    def fit(self, method: Decomposer, rank: Rank, *, draft: bool) -> FittedLayer | None:
        """The fit itself, or None if it fails; only methods that iterate have drafts."""
        key = rank, draft and method.iterative
        return self._cached(method, key, lambda: self._fit_now(method, rank, draft=draft))

    def _fit_now(self, method: Decomposer, rank: Rank, *, draft: bool) -> FittedLayer | None:
        try:
            return fit_layer(self.weight, self.spec, method, rank, self.moments, draft=draft)
        except (ValueError, torch.linalg.LinAlgError):
            return None

    def known_fit(self, method: Decomposer, rank: Rank, *, draft: bool) -> FittedLayer | None:
        """The fit, or the draft, at this rank if one was made."""
        fit: FittedLayer | None = self.cache.known(key_of(method, (rank, draft)))
        return fit

    def _in_unit(self, measured: Measured) -> Lost:
        # Not cached: the unit depends on which other layers are decomposed.
        loss, share = measured
        return self.unit * share if loss is None else loss, share

    def _known_ranks_now(self, method: Decomposer, steps: Sequence[int]) -> KnownRanks | None:
        method = method.for_layer(self.spec)
        with full_precision(self.weight.device):
            variance = self._variance(method)
            (kernel,), (second,), (importance,) = self._norms(method)
            best = method.best_ranks(kernel, second, importance, steps)
            if best is None:
                return None
            whole = best.lost((0,) * len(steps)) if variance is None else variance
            return KnownRanks(best, whole or 1.0)

    def _nested_now(self, method: Decomposer) -> list[Measured] | None:
        method = method.for_layer(self.spec)
        with full_precision(self.weight.device):
            variance = self._variance(method)
            plain: Tensor | None = None
            weighted: Tensor | None = None
            for kernel, second, importance in zip(*self._norms(method), strict=True):
                found = method.plain_and_weighted_losses(kernel, second, importance)
                if found is None:
                    return None
                plain, weighted = _sum(plain, found[0]), _sum(weighted, found[1])
            assert plain is not None
            whole = float(plain[0]) if variance is None else variance
            shares = (plain / (whole or 1.0)).tolist()
            losses = [None] * len(shares) if weighted is None else weighted.tolist()
            return list(zip(losses, shares, strict=True))

    def _norms(
        self, method: Decomposer
    ) -> tuple[Sequence[Tensor], Sequence[SecondMoment | None], Sequence[Tensor | None]]:
        """Each group's kernel, and by what its losses are measured: moments and importance."""
        dtype = fit_to_dtype(method, self.weight, self.spec)
        kernels = group_kernels(self.weight.detach().to(dtype), self.spec)
        unknown = [None] * len(kernels)
        if self.moments is None or not self.fits_to_data(method):
            return kernels, unknown, unknown
        blocks = self.moments.gradient_blocks()
        return kernels, self.moments.second_moments(), unknown if blocks is None else blocks

    def _variance(self, method: Decomposer) -> float | None:
        """Of the layer's outputs; None where losses are those of the weights."""
        if self.moments is None or not self.fits_to_data(method):
            return None
        return self.moments.output_variance(self.weight)


def key_of(method: Decomposer, what: Hashable) -> Hashable:
    """Under which the caches of losses know what was asked of a method."""
    # The repr has the method's options; methods need not be hashable.
    return type(method), method.name, repr(method), what


def _sum(total: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if total is None or other is None else total + other


def whole_loss(weight: Tensor, moments: LayerMoments) -> float | None:
    """The loss of a layer's whole output, or None where its gradients are not known."""
    if moments.gradient is None:
        return None
    with full_precision(weight.device):
        return moments.weighted_loss(weight, moments.second_moments())


def only_rank(rank: Rank) -> int:
    """The rank of a method that has a single one, as all nested methods have."""
    assert isinstance(rank, int)
    return rank
