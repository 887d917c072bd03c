"""One layer fitted by one method at one rank: plain data in, plain data out."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdecomp.calibration.layer_moments import LayerMoments
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.factors import Factorization, Factors
from tdecomp.layers.chain import Rank
from tdecomp.layers.spec import LayerSpec
from tdecomp.linalg.second_moment import SecondMoment
from tdecomp.linalg.spectrum import Spectrum, spectra
from tdecomp.linalg.svd import frobenius_norm
from tdecomp.torch_state import undisturbed


@dataclass(frozen=True)
class FittedLayer:
    """The factors of a layer, and what they lose.

    Attributes
    ----------
    factors : Factorization
        In the dtype of the weight.
    weight_error : float
        ‖W − W̃‖ / ‖W‖ in the Frobenius norm.
    output_error : float or None
        The lost share of the output's variance, by the moments; None without.
    loss : float or None
        The output's squared error weighted by the output's gradients; None where these are not
        known.
    shift : Tensor, shape (out,), or None
        What to add to the bias, so that the mean output stays.
    component_norms : float or None
        The sum of the norms of the terms that add up to the kernel, over the kernel's norm.
    seconds : float
    notes : tuple of str
    """

    factors: Factorization
    weight_error: float
    output_error: float | None
    loss: float | None
    shift: Tensor | None
    component_norms: float | None
    seconds: float
    notes: tuple[str, ...] = ()


def fit_layer(
    weight: Tensor,
    spec: LayerSpec,
    method: Decomposer,
    rank: Rank,
    moments: LayerMoments | None = None,
    start: Factorization | None = None,
    *,
    draft: bool = False,
) -> FittedLayer:
    """Fit a layer's weight, by the moments of its inputs where there are any.

    >>> weight = torch.eye(4)
    >>> fit_layer(weight, LayerSpec(4, 4), SVD(), 4).weight_error < 1e-6
    True

    A pure function; its arguments and its result can be pickled.

    Parameters
    ----------
    weight : Tensor
        In the layer's own layout and dtype.
    spec : LayerSpec
    method : Decomposer
    rank : int or tuple of int
    moments : LayerMoments, optional
        On the weight's device.
    start : Factorization, optional
        Factors of this rank to improve on, for methods that iterate.
    draft : bool
        Whether a few iterations are enough, since the result is only compared with other drafts.

    Raises
    ------
    ValueError, torch.linalg.LinAlgError
        If the fit fails, or the factors are not finite.
    """
    began = time.perf_counter()
    with undisturbed(weight.device):
        second = None if moments is None else moments.second_moments()
        factors = factorize(method, weight, spec, rank, second, start, draft=draft)
        seconds = time.perf_counter() - began
        # The factors have the weight's dtype by now; their product is not rounded once more.
        precise = factors.to(fit_dtype(method, weight))
        approximation = precise.to_kernel()
        weight_error = relative_error(weight, approximation)
        output_error = loss = shift = None
        if moments is not None and second is not None:
            gone = weight.detach().double() - approximation.double()
            output_error, loss = moments.lost(weight, gone, second)
            shift = moments.mean_output(gone) if spec.bias else None
    if not math.isfinite(weight_error):
        raise ValueError("the factors are not finite")
    norms = precise.component_norms()
    return FittedLayer(
        factors,
        weight_error,
        output_error,
        loss,
        shift,
        None if norms is None else norms / (frobenius_norm(weight) or 1.0),
        seconds,
        _notes(method, spec, moments),
    )


def _notes(method: Decomposer, spec: LayerSpec, moments: LayerMoments | None) -> tuple[str, ...]:
    if moments is None:
        return ()
    if not method.uses_moments:
        return (f"fitted by its weights: {method.name} uses no moments",)
    if moments.few:
        return (f"fewer samples ({moments.count:,}) than fan_in ({spec.fan_in:,})",)
    return ()


def factorize(
    method: Decomposer,
    weight: Tensor,
    spec: LayerSpec,
    rank: Rank,
    moments: Sequence[SecondMoment] | None = None,
    start: Factorization | None = None,
    *,
    draft: bool = False,
) -> Factorization:
    """The factors of a layer's weight, given in the layer's own layout.

    With moments, one for each group, in the norm of the layer's inputs, where the method can.
    Half precision is fitted in float32; the factors come back in the weight's dtype.
    """
    method.check_rank(rank, spec)
    draft = draft and method.iterative
    with undisturbed(weight.device):
        groups = None
        if moments is not None and method.uses_moments:
            groups = _fitted_to(method, weight, spec, rank, moments, start, draft)
        if groups is None:
            kernels = group_kernels(weight.detach().to(fit_dtype(method, weight)), spec)
            scales = [_scale(kernel) for kernel in kernels]
            starts = _starts(start, method, scales, kernels[0].dtype)
            groups = [
                _fit(method, kernel / scale, rank, near, draft).scaled(scale)
                for kernel, scale, near in zip(kernels, scales, starts, strict=True)
            ]
        return Factorization(spec, tuple(groups)).to(weight.dtype)


def _fitted_to(
    method: Decomposer,
    weight: Tensor,
    spec: LayerSpec,
    rank: Rank,
    moments: Sequence[SecondMoment],
    start: Factorization | None,
    draft: bool,
) -> list[Factors] | None:
    """Each group's factors in the norm of its moment; None if the method cannot."""
    groups = []
    kernels = group_kernels(weight.detach().double(), spec)
    scales = [_scale(kernel) for kernel in kernels]
    starts = _starts(start, method, scales, torch.float64)
    for kernel, scale, moment, near in zip(kernels, scales, moments, starts, strict=True):
        if draft:
            fitted = method.fit_to(kernel / scale, rank, moment, near, draft=True)
        else:
            fitted = method.fit_to(kernel / scale, rank, moment, near)
        if fitted is None:
            return None
        groups.append(fitted.scaled(scale))
    return groups


def _fit(
    method: Decomposer, kernel: Tensor, rank: Rank, start: Factors | None, draft: bool
) -> Factors:
    if not method.iterative:  # a method from outside need not know the other arguments
        return method.fit(kernel, rank)
    return method.fit(kernel, rank, start, draft=draft)


def _starts(
    start: Factorization | None, method: Decomposer, scales: Sequence[float], dtype: torch.dtype
) -> list[Factors | None]:
    """The factors to begin with, scaled as the kernels are."""
    if start is None or not method.iterative:
        return [None] * len(scales)
    pairs = zip(start.groups, scales, strict=True)
    return [factors.to(dtype).scaled(1 / scale) for factors, scale in pairs]


def spectra_of(method: Decomposer, weight: Tensor, spec: LayerSpec) -> tuple[Spectrum, ...] | None:
    """The spectrum behind each rank, or None if this method's rank has none."""
    with undisturbed(weight.device):
        per_group = [method.unfoldings(k) for k in group_kernels(weight.detach(), spec)]
        if per_group[0] is None:
            return None
        return tuple(spectra(list(zip(*per_group, strict=True))))  # type: ignore[arg-type]


def group_kernels(weight: Tensor, spec: LayerSpec) -> Sequence[Tensor]:
    """Each group's kernel (out / groups, in / groups, *kernel)."""
    return spec.to_forward_layout(weight).chunk(spec.groups)


def fit_dtype(method: Decomposer, weight: Tensor) -> torch.dtype:
    """float64 for float64 layers and for methods that need it, float32 for all others."""
    wide = method.fits_in_float64 or weight.dtype == torch.float64
    return torch.float64 if wide else torch.float32


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """‖W − W̃‖ / ‖W‖ in the Frobenius norm; 0 for a zero weight that is met exactly."""
    weight, approximation = weight.detach(), approximation.detach()
    if torch.float64 not in (weight.dtype, approximation.dtype):
        # A difference of float32 numbers has as many correct digits as they have.
        weight, approximation = weight.float(), approximation.float()
    return frobenius_norm(weight - approximation) / (frobenius_norm(weight) or 1.0)


def _scale(kernel: Tensor) -> float:
    # The squares inside a fit leave the range of float32 for entries of 1e-30 or 1e+30.
    return float(kernel.abs().max()) or 1.0
