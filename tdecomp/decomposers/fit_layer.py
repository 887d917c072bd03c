"""One layer fitted by one method at one rank: plain data in, plain data out."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdecomp.calibration.estimate import Estimate
from tdecomp.calibration.layer_moments import LayerMoments
from tdecomp.calibration.precision import difference
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.factors import Factorization, Factors
from tdecomp.layers.chain import Rank
from tdecomp.layers.spec import LayerSpec
from tdecomp.linalg.leading_outputs import is_large_kernel
from tdecomp.linalg.second_moment import SecondMoment, is_wide
from tdecomp.linalg.spectrum import Spectrum, spectra
from tdecomp.linalg.svd import frobenius_norm
from tdecomp.runtime.parallel import on_cpu
from tdecomp.runtime.torch_state import full_precision

# The squares of these, and their sums over a large kernel, are well in the range of float32.
_USUAL_ENTRIES = 1e-6, 1e6


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

    def held_out_error(self, weight: Tensor, moments: LayerMoments | None) -> Estimate | None:
        """The output error on samples that are held out; of what was fitted to without any."""
        if moments is None or self.output_error is None:
            return None
        with full_precision(weight.device):
            found = moments.held_error(weight, self.factors.to_kernel())
        return found or Estimate(self.output_error)


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
    """`factorize`, by the moments of the layer's inputs where there are any, and what is lost.

    A pure function; its arguments and its result can be pickled. The moments are on the weight's
    device. A fit that fails raises a ValueError or a LinAlgError, and so do factors that are not
    finite.
    """
    began = time.perf_counter()
    with full_precision(weight.device):
        second = leant_on = None
        if moments is not None:
            second = _second_moments(moments, weight, draft=draft)
            leant_on = moments.shrunk(second)
        factors = factorize(method, weight, spec, rank, leant_on, start, draft=draft)
    seconds = time.perf_counter() - began
    return measured(weight, spec, method, factors, moments, second, seconds)


def measured(
    weight: Tensor,
    spec: LayerSpec,
    method: Decomposer,
    factors: Factorization,
    moments: LayerMoments | None = None,
    second: Sequence[SecondMoment] | None = None,
    seconds: float = 0.0,
) -> FittedLayer:
    """What these factors lose in the layer's place; a ValueError if they are not finite."""
    with full_precision(weight.device):
        if moments is not None and second is None:
            second = moments.second_moments()
        # The factors have the weight's dtype by now; their product is not rounded once more.
        precise = factors.to(fit_dtype(method, weight))
        approximation = precise.to_kernel()
        weight_error = relative_error(weight, approximation)
        output_error = loss = shift = note = None
        if moments is not None and second is not None:
            # Factors of these methods make a new kernel each time.
            gone = difference(weight, approximation, overwrite=method.fits_large_in_float32)
            del approximation
            output_error, loss = moments.lost(weight, gone, second)
            shift = moments.mean_output(gone) if spec.bias else None
            if not method.uses_moments:
                note = f"fitted by its weights: {method.name} uses no moments"
            elif moments.few:
                note = f"fewer samples ({moments.patches:,}) than fan_in ({spec.fan_in:,})"
    if not math.isfinite(weight_error):
        raise ValueError("the factors are not finite")
    norms = precise.component_norms()
    if norms is not None:
        norms /= frobenius_norm(weight) or 1.0
    errors, notes = (weight_error, output_error, loss), (note,) if note else ()
    return FittedLayer(factors, *errors, shift, norms, seconds, notes)


def fit_size(weight: Tensor, spec: LayerSpec, moments: LayerMoments | None) -> int:
    """How many numbers a fit of this layer works on; 0 where a GPU does the work."""
    size = on_cpu(weight)
    if not size or moments is None or spec.lookup:
        return size
    # A fit to data makes many small steps on a moment where one to weights makes few large ones.
    return max(size, spec.fan_in**2 // 4)


def _second_moments(
    moments: LayerMoments, weight: Tensor, *, draft: bool
) -> Sequence[SecondMoment]:
    """Those that a fit is made and judged by: for drafts of wide layers in single precision."""
    if draft and is_wide(moments.spec.fan_in) and weight.dtype != torch.float64:
        return moments.single
    return moments.second_moments()


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
    """The factors, in the weight's dtype, of a weight in the layer's own layout.

    With moments, one for each group, in the norm of the layer's inputs, where the method can.
    Methods that iterate improve on `start`, factors of this rank; a draft makes few iterations.
    """
    method.check_rank(rank, spec)
    method = method.for_layer(spec)
    dtype, starts = fit_dtype(method, weight), start.groups if start else [None] * spec.groups
    seconds: Sequence[SecondMoment | None] = [None] * spec.groups
    if moments is not None and method.uses_moments:
        dtype, seconds = fit_to_dtype(method, weight, spec), moments
    groups: list[Factors] = []
    with full_precision(weight.device):
        copied = dtype != weight.dtype
        kernels = list(group_kernels(weight.detach().to(dtype), spec))
        for second, near in zip(seconds, starts, strict=True):
            kernel = kernels.pop(0)  # whose memory is free once it has been fitted
            # The squares inside a fit leave the range of float32 for entries of 1e-30 or 1e+30.
            largest = float(torch.maximum(*map(torch.abs, torch.aminmax(kernel))))
            scale = _scale(method, kernel, largest)
            if largest == 0 and (zero := _zero_factors(method, kernel, rank)) is not None:
                groups.append(zero)
                continue
            options: dict[str, Any] = {}
            if method.iterative:  # other methods need not know these
                begin = None if near is None else near.to(dtype).scaled(1 / scale)
                options = {"start": begin, "draft": draft}
            fitted: Factors | None
            if second is None or second.trace <= 0:  # inputs that never vary say nothing
                fitted = method.fit(_scaled(kernel, scale, overwrite=copied), rank, **options)
            elif method.iterative and not draft and weight.dtype.itemsize < 4:
                start_of_group = options["start"]
                fitted = _fit_to_be_rounded(
                    method, kernel, scale, rank, second, start_of_group, weight.dtype
                )
            else:
                scaled = _scaled(kernel, scale, overwrite=copied)
                fitted = method.fit_to(scaled, rank, second, **options)
                del scaled
            del kernel
            if fitted is None:
                return factorize(method, weight, spec, rank, None, start, draft=draft)
            groups.append(fitted if scale == 1.0 else fitted.scaled(scale))
        return Factorization(spec, tuple(groups)).to(weight.dtype)


def _scale(method: Decomposer, kernel: Tensor, largest: float) -> float:
    """What a kernel is divided by: its largest entry, unless a copy would cost too much for it."""
    usual = _USUAL_ENTRIES[0] < largest < _USUAL_ENTRIES[1]
    if usual and kernel.dtype == torch.float32 and method.fits_large_in_float32:
        return 1.0 if is_large_kernel(kernel) else largest
    return largest or 1.0


def _scaled(kernel: Tensor, scale: float, *, overwrite: bool) -> Tensor:
    """``kernel / scale``; with `overwrite` in the kernel's own memory."""
    if scale == 1.0:
        return kernel
    return kernel.div_(scale) if overwrite else kernel / scale


def _fit_to_be_rounded(
    method: Decomposer,
    kernel: Tensor,
    scale: float,
    rank: Rank,
    moment: SecondMoment,
    start: Factors | None,
    dtype: torch.dtype,
) -> Factors | None:
    """A fit to data, of `kernel / scale`, that loses no more than its start once both are rounded.

    The terms of CP may cancel each other, which rounding undoes.
    """
    before = method.fit(kernel / scale, rank) if start is None else start
    fitted = method.fit_to(kernel / scale, rank, moment, start=before)

    def lost(factors: Factors) -> float:
        rounded = factors.scaled(scale).to(dtype).to(kernel.dtype)
        return moment.lost((kernel - rounded.to_kernel()).flatten(1))

    before = before.balanced()
    return fitted if fitted is None or lost(fitted) <= lost(before) else before


def _zero_factors(method: Decomposer, kernel: Tensor, rank: Rank) -> Factors | None:
    """Factors of a zero kernel that can learn: only the last stage is zero, so gradients reach it.

    None where the method cannot tell the factors of a chain, or finds none for random numbers.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    values = torch.randn(kernel.shape, generator=generator, device="cpu").to(kernel)
    options: dict[str, Any] = {"draft": True} if method.iterative else {}
    try:
        fitted = method.fit(values / kernel[0].numel() ** 0.5, rank, **options)
    except (ValueError, torch.linalg.LinAlgError):
        return None
    *first, last = fitted.stage_weights()
    return method.factors_of((*first, _zeros_like(last)))


def _zeros_like(values: Any) -> Any:
    """Zeros; of a stage's several tensors in the last one alone, so that gradients reach it."""
    if isinstance(values, tuple):
        return (*values[:-1], _zeros_like(values[-1]))
    return torch.zeros_like(values)


def spectra_of(method: Decomposer, weight: Tensor, spec: LayerSpec) -> tuple[Spectrum, ...] | None:
    """The spectrum behind each rank, or None if this method's rank has none."""
    method = method.for_layer(spec)
    with full_precision(weight.device):
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


def fit_to_dtype(method: Decomposer, weight: Tensor, spec: LayerSpec) -> torch.dtype:
    """float64 but for the large kernels of methods that take these in float32."""
    large = is_large_kernel(spec.to_forward_layout(weight).chunk(spec.groups)[0])
    return fit_dtype(method, weight) if large and method.fits_large_in_float32 else torch.float64


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """‖W − W̃‖ / ‖W‖ in the Frobenius norm; 0 for a zero weight that is met exactly."""
    return frobenius_norm(weight, approximation) / (frobenius_norm(weight) or 1.0)
