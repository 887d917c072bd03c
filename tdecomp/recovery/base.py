"""What the ways of getting accuracy back share: pairs of layers, and the error they lower."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdecomp.batches import Batches, count_samples, device_of, tensors_of
from tdecomp.chain import Chain
from tdecomp.layer import STOCK_LAYERS, LayerSpec
from tdecomp.tracing import no_fast_path, untouched

# Samples that the error of the whole model is taken on.
_ERROR_SAMPLES = 256


@dataclass(frozen=True)
class Recovery:
    """What one step did.

    Attributes
    ----------
    model : nn.Module
        A copy, or the model that was given if it was changed in place.
    step : str
    error_before, error_after : float
        The share of the variance of the original model's outputs that is lost.
    layers : dict of str to tuple of float
        For steps that go layer by layer, the share of each original output's variance that was
        lost before and after.
    notes : tuple of str
    """

    model: nn.Module
    step: str
    error_before: float
    error_after: float
    layers: dict[str, tuple[float, float]]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = f"{self.step}: output error {self.error_before:.4g} → {self.error_after:.4g}"
        return "; ".join((words, *self.notes))


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
    pairs = []
    layers = dict(original.named_modules())
    for name, module in model.named_modules():
        if not isinstance(module, Chain) or module.replaced is None:
            continue
        layer = layers.get(name)
        known = isinstance(layer, STOCK_LAYERS)
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


@contextmanager
def both_untouched(model: nn.Module, original: nn.Module) -> Iterator[None]:
    """Eval mode and no fused transformer kernels for both, all as it was afterwards."""
    with ExitStack() as stack:
        stack.enter_context(untouched(original))
        stack.enter_context(untouched(model))
        stack.enter_context(no_fast_path())
        yield


def lost_output(model: nn.Module, original: nn.Module, batches: Batches) -> float:
    """The share of the variance of the original's outputs that the model loses.

    Raises
    ------
    ValueError
        If the two models' outputs have different shapes.
    """
    lost = power = seen = 0.0
    total: list[Tensor] = []
    with both_untouched(model, original), torch.no_grad():
        for batch in batches.on(device_of(model)):
            mine = tensors_of(batches.run(model, batch))
            wanted = tensors_of(batches.run(original, batch))
            if [z.shape for z in mine] != [z.shape for z in wanted]:
                raise ValueError(
                    f"the models' outputs have shapes {[tuple(z.shape) for z in mine]} and "
                    f"{[tuple(z.shape) for z in wanted]}; expected the original of this model"
                )
            for z, y in zip(mine, wanted, strict=True):
                lost += float((z.double() - y.double()).square().sum())
                power += float(y.double().square().sum())
            sums = [y.double().flatten(1).sum(0) if y.dim() > 1 else y.double() for y in wanted]
            total = sums if not total else _added(total, sums)
            seen += count_samples(batch)
            if seen >= _ERROR_SAMPLES:
                break
    mean = sum(float(t.square().sum()) for t in total) / max(seen, 1.0)
    variance = power - mean
    return lost / variance if variance > 0 else float(lost > 0)


def _added(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    # Outputs of another size have no common mean: their power is what the error is a share of.
    return [x + y if x.shape == y.shape else x for x, y in zip(a, b, strict=True)]


def adopt(model: nn.Module, other: nn.Module) -> None:
    """Copy every parameter and buffer of a model of the same structure."""
    state = model.state_dict()
    with torch.no_grad():
        for name, value in other.state_dict().items():
            state[name].copy_(value)
