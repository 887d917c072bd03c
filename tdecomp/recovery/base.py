"""What the ways of getting accuracy back share: pairs of layers, and the error they lower."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdecomp.calibration.moments import Moments
from tdecomp.layers.chain import Chain
from tdecomp.layers.spec import LayerSpec, kind_of
from tdecomp.model.batches import Batches, Forward, count_samples, device_of, tensors_of
from tdecomp.model.surgery import copy_with
from tdecomp.torch_state import no_fast_path, untouched

# Samples that the error of the whole model is taken on.
_ERROR_SAMPLES = 256
# A variance below this share of the power is rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Recovery:
    """What one step did.

    Attributes
    ----------
    model : nn.Module
        A copy, or the model that was given if it was changed in place.
    step : str
    error_before, error_after : float
        The share of the variance of the original model's outputs that is lost, on the first few
        hundred samples; NaN without an original.
    layers : dict of str to tuple of float
        For steps that go layer by layer, the share of each original output's variance that was
        lost before and after, each direction of it counted as the model's outputs feel it.
    notes : tuple of str
    """

    model: nn.Module
    step: str
    error_before: float
    error_after: float
    layers: dict[str, tuple[float, float]]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        errors = f"output error {self.error_before:.4g} → {self.error_after:.4g}"
        known = not math.isnan(self.error_before)
        return "; ".join((f"{self.step}: {errors}" if known else f"{self.step}", *self.notes))


@dataclass(frozen=True)
class Pair:
    """A chain and the layer of the original that it replaced."""

    name: str
    chain: Chain
    layer: nn.Module
    spec: LayerSpec


def pairs_of(model: nn.Module, original: nn.Module, wanted_by: str) -> list[Pair]:
    """Every chain of `model` with the layer of `original` that stands in its place.

    Raises
    ------
    ValueError
        If `model` has no chains, or `original` is not what it was decomposed from.
    """
    pairs: list[Pair] = []
    layers = dict(original.named_modules())
    for name in chains_not_in(original, model):
        module = model.get_submodule(name)
        assert isinstance(module, Chain)
        again = any(module in pair.chain.modules() for pair in pairs)
        if again or module.replaced is None:  # a stage of a chain is no layer of the original
            continue
        layer = layers.get(name)
        known = layer is not None and kind_of(layer) is not None
        if layer is None or not known or LayerSpec.of(layer) != module.replaced:
            found = "no such layer" if layer is None else type(layer).__name__
            if layer is not None and known:
                found = str(LayerSpec.of(layer))
            raise ValueError(
                f"{wanted_by}: chain {name!r} replaced {module.replaced}, the original has "
                f"{found}; expected the model that this one was decomposed from"
            )
        pairs.append(Pair(name, module, layer, module.replaced))
    if not pairs:
        raise ValueError(
            f"{wanted_by}: the model has no decomposed layer; expected what decompose() or "
            "apply() made"
        )
    return pairs


def chains_not_in(original: nn.Module, model: nn.Module) -> list[str]:
    """The names of the model's chains that the original has not."""
    before = dict(original.named_modules())
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Chain):
            old = before.get(name)
            if not (isinstance(old, Chain) and _alike(old, module)):
                found.append(name)
    return found


def _alike(a: Chain, b: Chain) -> bool:
    return (a.replaced, a.method, a.rank) == (b.replaced, b.method, b.rank)


def batches_for(
    step: str, batches: Any, forward: Forward | None, max_batches: int | None
) -> Batches:
    """The batches for a step, which needs more than moments."""
    if isinstance(batches, Moments):
        raise ValueError(
            f"{step} runs the model on batches, got moments; expected a DataLoader or a list of "
            "batches, such as those that the moments were taken from"
        )
    return Batches(batches, step, forward, max_batches)


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy that can be trained, wherever it is made."""
    with torch.inference_mode(False):
        return copy_with(model, {})


@contextmanager
def both_untouched(model: nn.Module, original: nn.Module) -> Iterator[None]:
    """Eval mode and no fused transformer kernels for both, all as it was afterwards."""
    with ExitStack() as stack:
        stack.enter_context(untouched(original))
        stack.enter_context(untouched(model))
        stack.enter_context(no_fast_path())
        yield


class Yardstick:
    """How far models are from one original, always on the same samples.

    A DataLoader that shuffles would give others each time, and their difference would be taken
    for that of the models. `vary` changes each batch first, e.g. where the models were fitted to
    these very samples.

    Raises
    ------
    ValueError
        If the original's outputs hold no floating-point tensor, or are not finite.
    """

    def __init__(
        self, original: nn.Module, batches: Batches, vary: Callable[[Any], Any] | None = None
    ) -> None:
        self._batches = batches
        self._seen: list[tuple[Any, list[Tensor]]] = []
        samples = 0
        with untouched(original), no_fast_path(), torch.no_grad():
            for given in batches.on(device_of(original)):
                batch = given if vary is None else vary(given)
                wanted = [y.clone() for y in tensors_of(batches.run(original, batch))]
                self._seen.append((batch, wanted))
                samples += count_samples(batch)
                if samples >= _ERROR_SAMPLES:
                    break
        if not samples:
            raise ValueError("the batches hold no samples; expected at least one")
        self._variance = _variance([wanted for _, wanted in self._seen])
        if not math.isfinite(self._variance):
            raise ValueError(
                "the original model's outputs for the batches hold NaN or infinities; expected "
                "finite ones. Look at the batches and at the model's weights"
            )

    def lost_by(self, model: nn.Module) -> float:
        """The share of the variance of the original's outputs that the model loses.

        Raises
        ------
        ValueError
            If the two models' outputs have different shapes.
        """
        lost = 0.0
        with untouched(model), no_fast_path(), torch.no_grad():
            for batch, wanted in self._seen:
                mine = tensors_of(self._batches.run(model, batch))
                if [z.shape for z in mine] != [z.shape for z in wanted]:
                    raise ValueError(
                        f"the model's outputs have shapes {[tuple(z.shape) for z in mine]}, the "
                        f"original's {[tuple(z.shape) for z in wanted]}; expected the original of "
                        "this model"
                    )
                for z, y in zip(mine, wanted, strict=True):
                    lost += float((z.double() - y.double()).square().sum())
        return lost / self._variance if self._variance > 0 else float(lost > 0)


def _variance(outputs: Sequence[Sequence[Tensor]]) -> float:
    """Of all outputs of all batches, each entry about its own mean over the samples."""
    if not any(batch for batch in outputs):
        raise ValueError(
            "the original model's outputs hold no floating-point tensor, so that nothing tells "
            "how near a model comes to them; forward=lambda model, batch: ... may return some"
        )
    power = centred = 0.0
    for calls in zip(*outputs, strict=False):
        rows = [y.double().reshape(len(y) if y.dim() else 1, -1) for y in calls]
        square = sum(float(r.square().sum()) for r in rows)
        power += square
        if len({r.shape[1] for r in rows}) == 1:  # else nothing that the entries have in common
            total = sum((r.sum(dim=0) for r in rows), rows[0].new_zeros(rows[0].shape[1]))
            square -= float(total.square().sum()) / max(sum(len(r) for r in rows), 1)
        centred += square
    # A single sample has no variance that errors could be a share of.
    return centred if not centred <= _ROUNDING * power else power


def adopt(model: nn.Module, other: nn.Module) -> nn.Module:
    """The model with every parameter and buffer of another one of the same structure."""
    state = model.state_dict()
    with torch.no_grad():
        for name, value in other.state_dict().items():
            state[name].copy_(value)
    return model
