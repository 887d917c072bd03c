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

    Raises
    ------
    ValueError
        If `model` has no chains, or `original` is not the model that it was decomposed from.
    """
    found: list[ReplacedLayer] = []
    layers = dict(original.named_modules())
    for name in new_chains(model, original):
        chain = model.get_submodule(name)
        assert isinstance(chain, Chain)
        stage = any(chain in other.chain.modules() for other in found)
        if stage or chain.replaced is None:  # a chain inside a chain replaced one of its stages
            continue
        layer = layers.get(name)
        known = layer is not None and kind_of(layer) is not None
        if layer is None or not known or LayerSpec.of(layer) != chain.replaced:
            there = "no such layer" if layer is None else type(layer).__name__
            if layer is not None and known:
                there = str(LayerSpec.of(layer))
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


def new_chains(model: nn.Module, original: nn.Module) -> list[str]:
    """The names of the chains of `model` that `original` does not have."""
    before = dict(original.named_modules())
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Chain):
            old = before.get(name)
            if not isinstance(old, Chain) or _identity(old) != _identity(module):
                found.append(name)
    return found


def _identity(chain: Chain) -> tuple[Any, ...]:
    return chain.replaced, chain.method, chain.rank
