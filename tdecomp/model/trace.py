"""One forward pass, watched: which calls each layer gets, what it costs, who reads its weight."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from tdecomp.layers.spec import Call, LayerSpec
from tdecomp.torch_state import no_fast_path, untouched


@dataclass(frozen=True)
class Trace:
    """What one forward pass of the example inputs showed.

    Attributes
    ----------
    calls : mapping of module to list of Call
        Every watched layer, in no particular order; an empty list if it never ran.
    total_macs : int
        Of the whole pass, by torch's flop counter.
    oddities : mapping of module to str
        Why a layer's own `forward` is not all there is to it, for those where this is so.
    """

    calls: Mapping[nn.Module, list[Call]]
    total_macs: int
    oddities: Mapping[nn.Module, str]


def trace(model: nn.Module, layers: Mapping[nn.Module, LayerSpec], example_inputs: Any) -> Trace:
    """Run `model` once on `example_inputs`, in eval mode without gradients, and watch `layers`.

    Training modes, buffers and the random state are as before afterwards.

    Raises
    ------
    ValueError
        If the model rejects the inputs.
    """
    args, kwargs = as_call(example_inputs)
    calls: dict[nn.Module, list[Call]] = {layer: [] for layer in layers}
    oddities: dict[nn.Module, str] = {}
    reads = _WeightReads(layers)
    counter = FlopCounterMode(display=False)

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reads.running.append(layer)
        value, *extra = (*args, *kwargs.values()) or (None,)
        if extra:
            oddities[layer] = "it is called with more than its input"
        if isinstance(value, Tensor):  # if not, the layer itself is about to complain
            calls[layer].append(layers[layer].call(value.shape))

    def after(*_: Any) -> None:
        reads.running.pop()

    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        for layer in layers:
            for handle in (
                layer.register_forward_pre_hook(before, with_kwargs=True),
                layer.register_forward_hook(after, always_call=True),
            ):
                stack.callback(handle.remove)
        try:
            with torch.no_grad(), no_fast_path(), reads, counter:
                model(*args, **kwargs)
        except Exception as error:
            raise ValueError(
                f"the model rejected example_inputs ({describe(example_inputs)}): "
                f"{type(error).__name__}: {error}. Expected a tensor, a tuple of positional or a "
                "dict of keyword arguments with which model(...) runs"
            ) from error
    for layer in reads.elsewhere:
        oddities.setdefault(layer, "its weight is read outside its own forward")
    return Trace(calls, counter.get_total_flops() // 2, oddities)


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: those of a tuple, those of a dict, or one of any other."""
    if isinstance(example_inputs, dict):
        return (), example_inputs
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    return (example_inputs,), {}


def describe(value: Any) -> str:
    """A few words on example inputs, for messages."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(describe, value)) + ")"
    return type(value).__name__


class _WeightReads(TorchFunctionMode):
    """Finds weights that some torch function sees while their layer is not the one running."""

    def __init__(self, layers: Mapping[nn.Module, LayerSpec]) -> None:
        super().__init__()
        self.running: list[nn.Module] = []
        self.elsewhere: set[nn.Module] = set()
        self._owners = {id(p): layer for layer in layers for p in layer.parameters(recurse=False)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in _flat((args, kwargs or {})):
            owner = self._owners.get(id(value))
            if owner is not None and owner not in self.running:
                self.elsewhere.add(owner)
        return func(*args, **(kwargs or {}))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        yield value
        return
    for item in value:
        yield from _flat(item)
