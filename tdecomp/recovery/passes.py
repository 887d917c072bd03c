"""Passes of batches through the original and the decomposed model, for refitting chains."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor, nn

from tdecomp.calibration.accumulator import Accumulator, OutputGradients
from tdecomp.calibration.data import Batches, CountedRows
from tdecomp.model.batches import count_samples, device_of
from tdecomp.recovery.replaced import ReplacedLayer
from tdecomp.torch_state import hooks, no_inference_mode

# A chain is refitted to at least this many samples, and to this many patches for each entry of a
# patch: early layers have thousands of patches in every image and need not see all images.
_SAMPLES = 512
_PATCHES = 64
# The samples that the gradients at the layers' outputs are taken of.
_GRADIENT_SAMPLES = 256


def chain_calls(
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


def output_gradients(
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


def layer_sums(
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
            x, y = (rows.of_layer(tensor, layer.spec) for tensor in (x, y))
            if not (x.isfinite().all() and y.isfinite().all()):
                raise ValueError(
                    f"refit: {layer}: its inputs or the original's outputs hold NaN or infinities; "
                    "expected finite activations. Look at the batches and at the layers before it"
                )
            sums.add(x, y)
        samples += count_samples(batch)
        if samples >= _SAMPLES and sums.count >= _PATCHES * layer.spec.fan_in:
            break
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
