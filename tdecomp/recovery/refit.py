"""Refitting each chain to the original layer's outputs, on the inputs that the chain really gets.

Zhang et al. 2016, "Accelerating Very Deep Convolutional Networks for Classification and
Detection", section 3.3: asymmetric reconstruction, in the order of the network.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tdecomp.calibration.accumulator import is_large
from tdecomp.calibration.augment import Augment, flip_and_shift
from tdecomp.calibration.calibrate import unwatched
from tdecomp.calibration.counted_rows import CountedRows
from tdecomp.calibration.memory import freed_at_once
from tdecomp.calibration.output_gradients import OutputGradients
from tdecomp.calibration.passes import Batches
from tdecomp.decomposers.base import Decomposer
from tdecomp.layers.chain import Chain
from tdecomp.layers.lookup_chain import HeadChain
from tdecomp.linalg.second_moment import is_wide
from tdecomp.model.batches import Forward, device_of
from tdecomp.recovery.attempt import Attempt, errors_so_far, left_note
from tdecomp.recovery.held_out import HeldOut
from tdecomp.recovery.matching import Match
from tdecomp.recovery.recovery import Recovery, RecoveryStep, run_on_copy
from tdecomp.recovery.replaced import ReplacedLayer, replaced_layers
from tdecomp.recovery.walk import Walk
from tdecomp.runtime.parallel import OneThread
from tdecomp.runtime.torch_state import evaluating, exact_passes, full_precision, no_inference_mode

# The samples that the gradients at the layers' outputs are taken of.
_GRADIENT_SAMPLES = 128


@dataclass(frozen=True)
class Refit(RecoveryStep):
    """`refit` as a step of `decompose`, with its option `gradients`.

    >>> Refit(gradients=False)
    Refit(gradients=False)

    Parameters
    ----------
    gradients : bool
        As for `refit`.
    """

    name: ClassVar[str] = "refit"
    uses_variants: ClassVar[bool] = True

    gradients: bool = True

    def run(
        self, model: nn.Module, original: nn.Module, batches: Batches, held_out: HeldOut
    ) -> Recovery:
        batches.require_several_passes("an error taken before and after")
        replaced = replaced_layers(model, original, self.name)
        attempt = Attempt(model, held_out)
        layers: dict[str, tuple[float, float]] = {}
        rows, device = CountedRows(batches), device_of(model)
        large = any(is_large(layer.spec) for layer in replaced)
        sparing = freed_at_once() if large else nullcontext()
        with evaluating(model, original), exact_passes(), torch.no_grad(), sparing:
            walk = Walk.through(model, original, replaced, batches, device)
            reasons = {layer: _why_not(layer, walk.calls[layer]) for layer in replaced}
            chains = [layer for layer, reason in reasons.items() if reason is None]
            notes = [
                f"{layer.name!r} ({layer.spec}) left as it was: {reason}"
                for layer, reason in reasons.items()
                if reason is not None
            ]
            slopes, samples = (
                _output_gradients(original, chains, batches) if self.gradients else ({}, 0)
            )
            if self.gradients and not slopes:
                notes.append(
                    "no gradients can be taken, so that all outputs of a layer count alike"
                )
            items, short = walk.items(chains, device) if chains else ([], None)
            notes += [short] if short else []
            patches = sum(item.samples for item in items if not item.held)
            found = walk.arrivals(chains, items) if chains else ()
            kept, so_far = 0, partial(errors_so_far, layers)
            for layer, arrivals in batches.progress.over(
                found, self.name, len(chains), "layers", so_far
            ):
                match = Match(layer, items, int(patches * walk.patches[layer]), batches.seed or 0)
                for item, calls in arrivals:
                    rows.begin(item.batch)
                    for x, y in calls:
                        match.add(item, x, y, rows)
                narrow = not is_wide(layer.spec.fan_in)
                with full_precision(device), OneThread() if narrow else nullcontext():
                    *lost, better = match.refit(slopes.get(layer.name), samples)
                layers[layer.name] = lost[0], lost[1]
                kept += not better
        if layers:
            rows.check_used()
        notes += left_note(kept, len(layers), "chains")
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
    >>> recovery = refit(smaller, original, [torch.randn(512, 16)], progress=False)
    >>> recovery.error_after < recovery.error_before
    True

    Chains are refitted in the order in which they run, each by its own method and options: all its
    factors and its bias are solved for again, so that its output for the decomposed model's own
    activations comes nearest to the original layer's output. How near it stays to the original
    kernel is chosen by a fold of the samples, and it is changed only where samples that are held
    out surely gain.

    The batches go through both models once: each waits at a chain, in a thread of its own, until
    all are there, so that what they hold at one place has to fit into the memory (`max_memory` of
    a `Data`, by default half of what is free; fewer are used if it does not). Models whose passes
    write or draw what others read take a pass for each chain instead, and so do chains that are
    called several times.

    Parameters
    ----------
    model : nn.Module
        What `decompose` or `apply` made of `original`.
    original : nn.Module
        The model before it was decomposed; it is left as it was.
    batches : list of batches, DataLoader or Data
        As for `tdecomp.calibrate`; there are several passes.
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
        With the model, and its error before and after.

    Raises
    ------
    ValueError
        If the model was not decomposed from this original.
    """
    return run_on_copy(
        Refit(gradients), model, original, batches, inplace, forward=forward, seed=seed,
        max_batches=max_batches, augment=augment, progress=progress,
    )  # fmt: skip


def _why_not(layer: ReplacedLayer, calls: int) -> str | None:
    """The reason why a chain cannot be refitted, if there is one."""
    method: Decomposer | None = layer.chain.decomposer
    if not calls:
        return "the first batch does not reach it"
    if layer.spec.lookup:
        return "a lookup gets the same rows as the original's"
    if (why := unwatched(layer.spec)) is not None:
        return why
    if isinstance(layer.chain, HeadChain):
        return "it shares a factor with an embedding"
    if any(isinstance(part, Chain) for part in layer.chain):
        return "it was decomposed in several steps"
    if method is None:
        return f"its method {layer.chain.method!r} is not known; register it before loading"
    if not method.uses_moments:
        return f"{method.name} uses no moments"
    with full_precision(device_of(layer.chain)):
        known = method.factors_in(layer.chain)
    return None if known else f"{method.name} cannot tell the factors of its chain"


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
