"""The chains of a decomposed model, each with the layer of the original that it replaced."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from tdecomp.layers.chain import Chain
from tdecomp.layers.spec import LayerSpec, kind_of


@dataclass(frozen=True)
class ReplacedLayer:
    """A layer of the original, and the chain that took its place."""

    name: str
    chain: Chain
    layer: nn.Module
    spec: LayerSpec

    def __str__(self) -> str:
        return f"layer {self.name!r} ({self.spec})"


def replaced_layers(model: nn.Module, original: nn.Module, caller: str) -> list[ReplacedLayer]:
    """Every chain of `model` with the layer of `original` at the same place.

    Raises a ValueError if there is no chain, or if `original` is not the model it was made from.
    """
    found: list[ReplacedLayer] = []
    layers = dict(original.named_modules())
    for name, chain in new_chains(model, original).items():
        stage = any(chain in other.chain.modules() for other in found)
        if stage or chain.replaced is None:  # a chain inside a chain replaced one of its stages
            continue
        layer = layers.get(name)
        spec = None if layer is None or kind_of(layer) is None else LayerSpec.of(layer)
        if layer is None or spec != chain.replaced:
            there = "no such layer" if layer is None else spec or type(layer).__name__
            raise ValueError(
                f"{caller}: chain {name!r} replaced {chain.replaced}, the original has {there}; "
                "expected the model that this one was decomposed from"
            )
        found.append(ReplacedLayer(name, chain, layer, chain.replaced))
    if not found:
        raise ValueError(
            f"{caller}: the model has no decomposed layer; expected a model that decompose() or "
            "apply() made"
        )
    return found


def new_chains(model: nn.Module, original: nn.Module) -> dict[str, Chain]:
    """The chains of `model` by name, without those that `original` has as well."""
    before = dict(original.named_modules())
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Chain) and _identity(module) != _identity(before.get(name))
    }


def _identity(module: nn.Module | None) -> Any:
    return (module.replaced, module.method, module.rank) if isinstance(module, Chain) else None
