"""One layer fitted by one method at one rank: plain data in, plain data out."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdecomp.calibration.moments import LayerMoments
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
    """The factors of a layer, and what they lose."""

    factors: Factorization  # in the dtype of the weight
    weight_error: float  # ‖W − W̃‖ / ‖W‖ in the Frobenius norm
    output_error: float | None  # the lost share of the output's variance; None without moments
    loss: float | None  # the output's squared error weighted by its gradients; None without these
    shift: Tensor | None  # (out,): to add to the bias, so that the mean output stays
    component_norms: float | None  # over the kernel's norm; see `Factors.component_norms`
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

    A pure function; its arguments and its result can be pickled. The weight is in the layer's own
    layout, the moments on its device. Methods that iterate improve on `start`, factors of this
    rank; a draft makes few iterations, as it is only compared with other drafts. A fit that fails
    raises a ValueError or a LinAlgError, and so do factors that are not finite.
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
    if norms is not None:
        norms /= frobenius_norm(weight) or 1.0
    errors = (weight_error, output_error, loss)
    return FittedLayer(factors, *errors, shift, norms, seconds, _notes(method, spec, moments))


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
            kernels = group_kernels(weight.detach().double(), spec)
            groups = _fit_groups(method, kernels, rank, moments, start, draft)
        if groups is None:
            kernels = group_kernels(weight.detach().to(fit_dtype(method, weight)), spec)
            groups = _fit_groups(method, kernels, rank, [None] * len(kernels), start, draft)
        assert groups is not None
        return Factorization(spec, tuple(groups)).to(weight.dtype)


def _fit_groups(
    method: Decomposer,
    kernels: Sequence[Tensor],
    rank: Rank,
    moments: Sequence[SecondMoment | None],
    start: Factorization | None,
    draft: bool,
) -> list[Factors] | None:
    """Each group's factors, in the norm of its moment if it has one; None if the method cannot."""
    groups: list[Factors] = []
    starts: Sequence[Factors | None] = [None] * len(kernels)
    if start is not None and method.iterative:
        starts = start.groups
    for kernel, moment, near in zip(kernels, moments, starts, strict=True):
        # The squares inside a fit leave the range of float32 for entries of 1e-30 or 1e+30.
        scale = float(kernel.abs().max()) or 1.0
        if near is not None:
            near = near.to(kernel.dtype).scaled(1 / scale)
        # A method from outside that does not iterate need not know `start` and `draft`.
        drafted = {"draft": True} if draft else {}
        fitted: Factors | None
        if moment is not None:
            fitted = method.fit_to(kernel / scale, rank, moment, near, **drafted)
        elif method.iterative:
            fitted = method.fit(kernel / scale, rank, near, draft=draft)
        else:
            fitted = method.fit(kernel / scale, rank)
        if fitted is None:
            return None
        groups.append(fitted.scaled(scale))
    return groups


def spectra_of(method: Decomposer, weight: Tensor, spec: LayerSpec) -> tuple[Spectrum, ...] | None:
    """The spectrum behind each rank, or None if this method's rank has none."""
    with undisturbed(weight.device):
        per_group = [method.unfoldings(k) for k in group_kernels(weight.detach(), spec)]
        if per_group[0] is None:
            return None
        return tuple(spectra(list(zip(*per_group, strict=True))))


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
