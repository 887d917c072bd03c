"""Layers that have one weight: which of them can share its factors, and who has to follow whom."""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from tdecomp.layers.spec import LayerSpec, kind_of

# An output layer that is a plain product can follow the table that it is tied to.
_TABLE, _FOLLOWER = "Embedding", "Linear"


def groups_of(
    model: nn.Module, free: Callable[[nn.Module], bool]
) -> dict[nn.Module, tuple[nn.Module, ...]]:
    """The layers that can share one factorization, in the order of the model, for each of them.

    They are Embeddings, and Linears beside them, that hold the same parameter as their weight and
    are `free` to be replaced. A bias may be another module's, too, if that is no layer.
    """
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(module)
    biases = _biases(model)
    found: dict[nn.Module, tuple[nn.Module, ...]] = {}
    for layers in owners.values():
        kinds = [kind.name if (kind := kind_of(layer)) else "" for layer in layers]
        if len(layers) < 2 or _TABLE not in kinds or {*kinds} - {_TABLE, _FOLLOWER}:
            continue
        if all(free(layer) and _own_bias(layer, biases) for layer in layers):
            found |= dict.fromkeys(layers, tuple(layers))
    return found


def _biases(model: nn.Module) -> dict[int, list[nn.Module]]:
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    return owners


def _own_bias(layer: nn.Module, owners: Mapping[int, Sequence[nn.Module]]) -> bool:
    bias = layer._parameters.get("bias")
    if bias is None:
        return True
    return all(other is layer or kind_of(other) is None for other in owners[id(bias)])


def leader(specs: Sequence[LayerSpec]) -> int:
    """The place of the layer that a group is fitted as: an output layer, or the first table."""
    return next((at for at, spec in enumerate(specs) if not spec.lookup), 0)


Tied = TypeVar("Tied", bound=Any)  # a site


def tied_in_words(names: Iterable[str], what: str = "weight") -> str:
    """The reason of a layer that is tied to others, which cannot all follow."""
    return f"its {what} is tied: {', '.join(sorted(map(repr, names)))} share it"


def settle(sites: MutableMapping[str, Tied]) -> None:
    """Where one layer of a group is left alone, so are the others."""
    for name, site in list(sites.items()):
        if site.tied and any(sites[other].reason is not None for other in site.tied):
            reason = site.reason or tied_in_words(site.tied)
            sites[name] = replace(site, reason=reason)
