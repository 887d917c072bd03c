"""Refitting each chain to the original layer's outputs, on the inputs it really gets.

Zhang et al. 2016, "Accelerating Very Deep Convolutional Networks for Classification and
Detection", section 3.3: asymmetric reconstruction, in the order of the network.
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tdecomp.calibration.accumulator import Accumulator
from tdecomp.calibration.augment import Augment, flip_and_shift, variants
from tdecomp.calibration.gradients import OutputGradients
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.factors import Factorization
from tdecomp.decomposers.registry import get_decomposer, registered
from tdecomp.layers.chain import Chain
from tdecomp.layers.spec import LayerSpec
from tdecomp.model.batches import Batches, Forward, count_samples, device_of
from tdecomp.recovery.base import (
    Pair,
    Recovery,
    Yardstick,
    adopt,
    batches_for,
    both_untouched,
    copy_of,
    pairs_of,
)
from tdecomp.recovery.matching import Match
from tdecomp.torch_state import undisturbed

# Samples, and patches for each entry of one, that tell all there is to know of a layer: early
# layers have thousands of patches in every image and need not see all of them.
_SAMPLES = 512
_PATCHES = 64
# Whose gradients say how much a layer's outputs matter.
_GRADIENT_SAMPLES = 256
# From the chain's own factors, which are good already.
_ITERATIONS = 25


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
    progress: bool = True,
) -> Recovery:
    """Fit every chain of a decomposed model to what the original layer gave, without labels.

    >>> original = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> smaller = tdecomp.decompose(original, "svd", rank=2, progress=False).model
    >>> recovery = refit(smaller, original, [torch.randn(64, 16)], progress=False)
    >>> recovery.error_after < recovery.error_before
    True

    Chains are taken in the order in which they run. For each, the batches go through both models
    up to there, second moments are summed up, and all its factors (and its bias) are solved for
    again, so that its output for the decomposed model's own activations comes nearest to the
    original's, above all where that matters. Activations are not kept, and a layer sees no more
    batches than it has use for.

    Parameters
    ----------
    model : nn.Module
        What `decompose` or `apply` made.
    original : nn.Module
        What it was made from.
    batches : iterable of batches
        As for `tdecomp.calibrate`; a list or a DataLoader, as there is a pass for each chain.
    gradients : bool
        Let errors in a layer's outputs count as the original model's own outputs would feel them,
        by the gradients of random mixtures of these; else all alike.
    augment : callable ``(batch, generator) -> batch``, optional
        Varies batches, for layers that the batches hold too few patches for; by default images
        are mirrored and shifted a little, all else stays.
    forward, max_batches
        As for `tdecomp.calibrate`.
    inplace : bool
        Change `model` itself, wholly or, on an error, not at all.
    progress : bool
        Show a bar over the chains.

    Returns
    -------
    Recovery

    Raises
    ------
    ValueError
        If the model was not decomposed from this original, and as `tdecomp.calibrate`.
    """
    source = batches_for("refit", batches, forward, max_batches)
    source.again("a pass for each chain")
    changed = copy_of(model)
    pairs = pairs_of(changed, original, "refit")
    yardstick = Yardstick(original, source)
    before = yardstick.lost_by(changed)
    layers: dict[str, tuple[float, float]] = {}
    notes: list[str] = []
    with both_untouched(changed, original), torch.no_grad():
        ordered, calls = _in_network_order(changed, pairs, source)
        notes += [_left(p, "the first batch does not reach it") for p in pairs if p not in ordered]
        slopes, samples = _gradients(original, ordered, source) if gradients else ({}, 0)
        if gradients and not slopes:
            notes.append("no gradients can be taken, so that all outputs of a layer count alike")
        for pair in tqdm(ordered, desc="refit", unit="layer", disable=not progress):
            before_chain, reason = _factors_of(pair)
            if before_chain is None:
                notes.append(_left(pair, reason))
                continue
            sums = _sums(changed, original, pair, calls[pair.chain], source, augment)
            with undisturbed(device_of(pair.chain)):
                match = _match(pair, sums, slopes.get(pair.name), samples)
                layers[pair.name] = _refit_chain(pair, before_chain, match)
    after = yardstick.lost_by(changed)
    changed = adopt(model, changed) if inplace else changed
    return Recovery(changed, "refit", before, after, layers, tuple(notes))


def _left(pair: Pair, reason: str) -> str:
    return f"{pair.name!r} ({pair.spec}) left as it was: {reason}"


def _factors_of(pair: Pair) -> tuple[Factorization | None, str]:
    """The factors that the chain holds, or None and the reason why it cannot be refitted."""
    method = pair.chain.method
    if pair.spec.transposed:
        return None, "transposed convolutions have no moments"
    if any(isinstance(part, Chain) for part in pair.chain):
        return None, "it was decomposed in several steps"
    if method not in registered():
        return None, f"{method!r} is not registered (tdecomp.register)"
    decomposer = _decomposer(pair)
    if not decomposer.uses_moments:
        return None, f"{method} uses no moments"
    with undisturbed(_parameter(pair.layer.weight).device):
        factors = decomposer.factorization_of(pair.chain, pair.spec)
    return factors, f"{method} cannot tell the factors of its chain"


def _decomposer(pair: Pair) -> Decomposer:
    assert pair.chain.method is not None
    return get_decomposer(pair.chain.method)


class _Reached(BaseException):
    """The pass has come as far as it has to. No error: nobody's `except Exception` stops it."""


def _in_network_order(
    model: nn.Module, pairs: Sequence[Pair], batches: Batches
) -> tuple[list[Pair], dict[Chain, int]]:
    """The pairs in the order in which a pass first reaches them, and how often it does."""
    calls: dict[Chain, int] = {}

    def count(chain: nn.Module, *_: Any) -> None:
        assert isinstance(chain, Chain)
        calls[chain] = calls.get(chain, 0) + 1

    with ExitStack() as stack:
        for pair in pairs:
            stack.callback(pair.chain.register_forward_pre_hook(count).remove)
        batches.run(model, next(batches.on(device_of(model))))
    order = {chain: position for position, chain in enumerate(calls)}
    reached = [pair for pair in pairs if pair.chain in calls]
    return sorted(reached, key=lambda pair: order[pair.chain]), calls


def _sums(
    model: nn.Module,
    original: nn.Module,
    pair: Pair,
    calls: int,
    batches: Batches,
    augment: Augment | None,
) -> Accumulator:
    """The moments of the chain's inputs together with the original layer's outputs."""
    sums = Accumulator(pair.spec, with_outputs=True)
    samples = 0
    device = device_of(model)
    # First the batches as they are, then more of them, if there are too few.
    for batch in itertools.chain(batches.on(device), variants(batches, device, augment)):
        wanted = _seen(original, pair.layer, batch, batches, calls, lambda _, output: output)
        inputs = _seen(model, pair.chain, batch, batches, calls, lambda args, _: args[0])
        # Both run alike; a batch may call the chain less often than the first one did.
        for x, y in zip(inputs, wanted, strict=False):
            if not bool(torch.isfinite(x).all()) or not bool(torch.isfinite(y).all()):
                raise ValueError(
                    f"refit: layer {pair.name!r} ({pair.spec}): its inputs or the original's "
                    "outputs hold NaN or infinities; expected finite activations. Look at the "
                    "batches and at the layers before it"
                )
            sums.add(x, y)
        samples += count_samples(batch)
        if samples >= _SAMPLES and sums.count >= _PATCHES * pair.spec.fan_in:
            break
    return sums


def _seen(
    model: nn.Module,
    module: nn.Module,
    batch: Any,
    batches: Batches,
    calls: int,
    pick: Callable[[tuple[Any, ...], Any], Tensor],
) -> list[Tensor]:
    """What `pick` finds in each call of a module, running the model no further than needed."""
    found: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found.append(pick((*args, *kwargs.values()), output).clone())
        if len(found) == calls:
            raise _Reached

    handle = module.register_forward_hook(take, with_kwargs=True)
    try:
        batches.run(model, batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found


def _match(pair: Pair, sums: Accumulator, gradient: Tensor | None, samples: int) -> Match:
    moments = sums.finish(gradient)
    if moments is None:
        raise ValueError(f"refit: layer {pair.name!r} ({pair.spec}): the batches hold no samples")
    return Match(sums, moments, _parameter(pair.layer.weight), samples)


def _refit_chain(pair: Pair, before: Factorization, match: Match) -> tuple[float, float]:
    """Solve for the chain's factors again; the shares of the output lost before and after."""
    chain = pair.chain
    fitted = match.fit(_decomposer(pair).brief(_ITERATIONS), _rank(chain), before)
    old = _bias(chain)
    bias = match.best_bias(fitted) if pair.spec.bias else None
    # As the chain is going to hold them.
    dtype = _parameter(chain[-1].weight).dtype
    fitted = fitted.to(dtype).to(torch.float64)
    bias = None if bias is None else bias.to(dtype)
    error_before, error_after = match.lost(before, old), match.lost(fitted, bias)
    if error_after < error_before:
        _put(chain, fitted, bias)
    return error_before, min(error_before, error_after)


def _gradients(
    original: nn.Module, pairs: Sequence[Pair], batches: Batches
) -> tuple[dict[str, Tensor], int]:
    """How much each layer's outputs matter, where it can be told, and by how many samples."""
    slopes = OutputGradients({pair.name: (pair.layer, pair.spec) for pair in pairs})
    with torch.inference_mode(False):
        try:
            for batch in batches.on(device_of(original)):
                slopes.add(original, batch, batches, _GRADIENT_SAMPLES - slopes.samples)
                if slopes.samples >= _GRADIENT_SAMPLES:
                    break
        except Exception:  # the model runs forwards, as has just been seen
            return {}, 0
    return slopes.finish(), slopes.samples


def _rank(chain: Chain) -> Any:
    assert chain.rank is not None
    return chain.rank


def _bias(chain: Chain) -> Tensor | None:
    bias = chain[-1].bias
    return bias.detach() if isinstance(bias, Tensor) else None


def _put(chain: Chain, fitted: Factorization, bias: Tensor | None) -> None:
    for part, values in zip(chain, fitted.stage_weights(), strict=True):
        _parameter(part.weight).copy_(LayerSpec.of(part).from_forward_layout(values))
    if bias is not None:
        _parameter(chain[-1].bias).copy_(bias)


def _parameter(value: Any) -> nn.Parameter:
    assert isinstance(value, nn.Parameter)
    return value
