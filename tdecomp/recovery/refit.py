"""Refitting each chain to the original layer's outputs, on the inputs that the chain really gets.

Zhang et al. 2016, "Accelerating Very Deep Convolutional Networks for Classification and
Detection", section 3.3: asymmetric reconstruction, in the order of the network.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tdecomp.calibration.accumulator import Accumulator, OutputGradients
from tdecomp.calibration.augment import Augment, flip_and_shift
from tdecomp.calibration.counted_rows import CountedRows
from tdecomp.calibration.data import Batches
from tdecomp.decomposers.assemble import factors_of_chain, write_factors
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.factors import Factorization
from tdecomp.layers.chain import Chain
from tdecomp.model.batches import Forward, count_samples, device_of
from tdecomp.recovery.attempt import Attempt
from tdecomp.recovery.held_out import HeldOut
from tdecomp.recovery.matching import Match
from tdecomp.recovery.recovery import Recovery, RecoveryStep, run_on_copy
from tdecomp.recovery.replaced import ReplacedLayer, replaced_layers
from tdecomp.torch_state import evaluating, exact_passes, full_precision, hooks, no_inference_mode

# The iterations of a fit, which starts from the chain's own factors.
_ITERATIONS = 25
# A chain is refitted to at least this many samples, and to this many patches for each entry of a
# patch: early layers have thousands of patches in every image and need not see all images.
_SAMPLES = 512
_PATCHES = 64
# The samples that the gradients at the layers' outputs are taken of.
_GRADIENT_SAMPLES = 256


@dataclass(frozen=True)
class Refit(RecoveryStep):
    """`refit` as a step of `decompose`, with its option `gradients`.

    >>> Refit(gradients=False)
    Refit(gradients=False)
    """

    name: ClassVar[str] = "refit"
    uses_variants: ClassVar[bool] = True

    gradients: bool = True

    def run(
        self, model: nn.Module, original: nn.Module, batches: Batches, held_out: HeldOut
    ) -> Recovery:
        batches.require_several_passes("a pass for each chain")
        replaced = replaced_layers(model, original, self.name)
        attempt = Attempt(model, held_out)
        layers: dict[str, tuple[float, float]] = {}
        rows = CountedRows(batches)
        with evaluating(model, original), exact_passes(), torch.no_grad():
            calls = _chain_calls(model, replaced, batches)
            missed = [layer for layer in replaced if layer not in calls]
            notes = [_left_alone(layer, "the first batch does not reach it") for layer in missed]
            slopes, samples = (
                _output_gradients(original, calls, batches) if self.gradients else ({}, 0)
            )
            if self.gradients and not slopes:
                notes.append(
                    "no gradients can be taken, so that all outputs of a layer count alike"
                )
            bar = tqdm(calls.items(), desc="refit", unit="layer", disable=not batches.progress)
            for layer, count in bar:
                factors, reason = _factors_of(layer)
                if factors is None:
                    notes.append(_left_alone(layer, reason))
                    continue
                sums = _layer_sums(model, original, layer, count, batches, rows)
                with full_precision(device_of(layer.chain)):
                    moments = sums.finish(slopes.get(layer.name))
                    if moments is None:
                        raise ValueError(f"refit: {layer}: the batches hold no samples that count")
                    match = Match(sums, moments, layer.layer.get_parameter("weight"), samples)
                    layers[layer.name] = _refit_chain(layer, factors, match)
        if layers:
            rows.check_used()
        return attempt.finish(self.name, layers, notes)


def refit(
    model: nn.Module,
    original: nn.Module,
    batches: Any,
    *,
    gradients: bool = True,
    augment: Augment | None = flip_and_shift,
    forward: Forward | None = None,
    max_batches: int | None = None,
    inplace: bool = False,
    seed: int | None = None,
    progress: bool = True,
) -> Recovery:
    """Fit every chain of a decomposed model to the original layer's outputs, without labels.

    >>> original = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> smaller = tdecomp.decompose(original, "svd", rank=2, progress=False).model
    >>> recovery = refit(smaller, original, [torch.randn(64, 16)], progress=False)
    >>> recovery.error_after < recovery.error_before
    True

    Chains are refitted in the order in which they run, each by its own method and options. For
    each, the batches go through both models up to there, second moments are summed up, and all its
    factors and its bias are solved for again, so that its output for the decomposed model's own
    activations comes nearest to the original layer's output. Activations are not kept, and no more
    batches are run for a chain than it needs.

    Parameters
    ----------
    model : nn.Module
        What `decompose` or `apply` made of `original`.
    original : nn.Module
    batches : list of batches, DataLoader or Data
        As for `tdecomp.calibrate`; there is a pass for each chain.
    gradients : bool
        Weight errors in a layer's outputs by how much the original model's outputs depend on
        them, by the gradients of random mixtures of these; else all errors count alike.
    augment : callable ``(batch, generator) -> batch``, optional
        Varies batches, for layers that the batches hold too few patches for; by default images
        are mirrored and shifted a little. A `Data` has its own.
    inplace : bool
        Change `model` itself, wholly or, on an error, not at all.
    forward, max_batches, seed, progress
        As for `tdecomp.calibrate`, and so are the errors raised.

    Returns
    -------
    Recovery

    Raises
    ------
    ValueError
        If the model was not decomposed from this original.
    """
    return run_on_copy(
        Refit(gradients), model, original, batches, inplace, forward=forward, seed=seed,
        max_batches=max_batches, augment=augment, progress=progress,
    )  # fmt: skip


def _left_alone(layer: ReplacedLayer, reason: str) -> str:
    return f"{layer.name!r} ({layer.spec}) left as it was: {reason}"


def _factors_of(layer: ReplacedLayer) -> tuple[Factorization | None, str]:
    """The factors that the chain holds, or None and the reason why it cannot be refitted."""
    method: Decomposer | None = layer.chain.decomposer
    if layer.spec.transposed:
        return None, "transposed convolutions have no moments"
    if any(isinstance(part, Chain) for part in layer.chain):
        return None, "it was decomposed in several steps"
    if method is None:
        return None, f"its method {layer.chain.method!r} is not known; register it before loading"
    if not method.uses_moments:
        return None, f"{method.name} uses no moments"
    with full_precision(device_of(layer.chain)):
        factors = factors_of_chain(layer.chain, method)
    return factors, f"{method.name} cannot tell the factors of its chain"


def _refit_chain(layer: ReplacedLayer, before: Factorization, match: Match) -> tuple[float, float]:
    """Solve for the chain's factors again; the shares of the output lost before and after."""
    chain, method = layer.chain, layer.chain.decomposer
    assert chain.rank is not None
    dtype, old = next(chain.parameters()).dtype, chain[-1].bias
    fitted = match.fit(method.limited(_ITERATIONS), chain.rank, before)
    bias = match.best_bias(fitted).to(dtype) if layer.spec.bias else None
    fitted = fitted.to(dtype).to(torch.float64)  # rounded as the chain is going to hold them
    error_before = match.lost(before, old.detach() if isinstance(old, Tensor) else None)
    error_after = match.lost(fitted, bias)
    if error_after < error_before:
        write_factors(chain, method, fitted)
        if bias is not None:
            chain[-1].get_parameter("bias").copy_(bias)
    return error_before, min(error_before, error_after)


def _chain_calls(
    model: nn.Module, replaced: Sequence[ReplacedLayer], batches: Batches
) -> Counter[ReplacedLayer]:
    """How often a pass calls each chain, in the order in which it first reaches them."""
    calls: Counter[ReplacedLayer] = Counter()

    def count(layer: ReplacedLayer, *_: Any) -> None:
        calls[layer] += 1

    counters = [
        partial(layer.chain.register_forward_pre_hook, partial(count, layer)) for layer in replaced
    ]
    with hooks(counters):
        batches.run(model, next(batches.on(device_of(model))))
    return calls


def _output_gradients(
    original: nn.Module, replaced: Iterable[ReplacedLayer], batches: Batches
) -> tuple[dict[str, Tensor], int]:
    """The second moments of the gradients at the layers' outputs, and the number of samples."""
    layers = {layer.name: (layer.layer, layer.spec) for layer in replaced}
    slopes = OutputGradients(layers, batches)
    with no_inference_mode():
        try:
            for batch in batches.on(device_of(original)):
                slopes.add(original, batch, _GRADIENT_SAMPLES - slopes.samples)
                if slopes.samples >= _GRADIENT_SAMPLES:
                    break
        except Exception:  # the forward pass worked before, so it is the backward pass that fails
            return {}, 0
    return slopes.finish(), slopes.samples


def _layer_sums(
    model: nn.Module,
    original: nn.Module,
    layer: ReplacedLayer,
    calls: int,
    batches: Batches,
    rows: CountedRows,
) -> Accumulator:
    """The moments of the chain's inputs together with the original layer's outputs."""
    sums = Accumulator(layer.spec)
    samples = 0
    device = device_of(model)
    # First the batches as they are, then variants of them if there are too few.
    for batch in itertools.chain(batches.on(device), batches.variants(device)):
        rows.begin(batch)
        wanted = _seen(original, layer.layer, batch, batches, calls, lambda _, output: output)
        inputs = _seen(model, layer.chain, batch, batches, calls, lambda args, _: args[0])
        # Both models make the same calls; a batch may make fewer of them than the first one did.
        for x, y in zip(inputs, wanted, strict=False):
            sums.add(*(rows.of_layer(tensor, layer.spec) for tensor in (x, y)))
        samples += count_samples(batch)
        if samples >= _SAMPLES and sums.count >= _PATCHES * layer.spec.fan_in:
            break
    held = (sums.total, sums.matrix, *sums.output_sums)
    if not all(bool(tensor.isfinite().all()) for tensor in held if tensor is not None):
        raise ValueError(
            f"refit: {layer}: its inputs or the original's outputs hold NaN or infinities, or "
            "numbers too large to be squared; expected finite activations. Look at the batches and "
            "at the layers before it"
        )
    return sums


class _Reached(BaseException):
    """The pass has come far enough. Not an Exception, so that no `except Exception` stops it."""


def _seen(
    model: nn.Module,
    module: nn.Module,
    batch: Any,
    batches: Batches,
    calls: int,
    pick: Callable[[tuple[Any, ...], Any], Tensor],
) -> list[Tensor]:
    """The tensors that `pick` takes from each call of a module; the pass ends with the last."""
    found: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found.append(pick((*args, *kwargs.values()), output).clone())
        if len(found) == calls:
            raise _Reached

    hook = partial(module.register_forward_hook, take, with_kwargs=True)
    with hooks([hook]), suppress(_Reached):
        batches.run(model, batch)
    return found
