"""One forward pass, watched: which calls each layer gets, what it costs, who reads its weight."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from tdecomp.layers.spec import Call, LayerSpec
from tdecomp.model.example import Example
from tdecomp.torch_state import hooks, no_fast_path, untouched


@dataclass(frozen=True)
class Trace:
    """What one forward pass of the example inputs showed."""

    calls: Mapping[nn.Module, list[Call]]  # of each watched layer; empty if it never ran
    total_macs: int  # of the whole pass, by torch's flop counter
    # How a layer is used, if in another way than by calling it with its input.
    oddities: Mapping[nn.Module, str]


def trace(
    model: nn.Module, layers: Mapping[nn.Module, LayerSpec], example_inputs: Example | Any
) -> Trace:
    """Run `model` once on an example, in eval mode without gradients, and watch `layers`.

    Training modes, buffers and the random state are restored. A model that rejects the inputs
    raises a ValueError.
    """
    example = Example.of(example_inputs)
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

    starts = [partial(m.register_forward_pre_hook, before, with_kwargs=True) for m in layers]
    ends = [partial(m.register_forward_hook, after, always_call=True) for m in layers]
    with untouched(model), hooks(starts), hooks(ends):
        try:
            with torch.no_grad(), no_fast_path(), reads, counter:
                example.run(model)
        except Exception as error:
            expected = (
                "inputs with which forward(model, inputs) runs"
                if example.forward
                else "a tensor, a tuple of positional or a dict of keyword arguments with which "
                "model(...) runs, or a way to call it: forward=lambda model, inputs: ..."
            )
            raise ValueError(
                f"the model rejected example_inputs ({example.describe()}): "
                f"{type(error).__name__}: {error}. Expected {expected}"
            ) from error
    for layer in reads.elsewhere:
        oddities.setdefault(layer, "its weight is read outside its own forward")
    return Trace(calls, counter.get_total_flops() // 2, oddities)


class _WeightReads(TorchFunctionMode):
    """Finds weights that a torch function is given while their own layer is not running."""

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
    if isinstance(value, (dict, tuple, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _flat(item)
    else:
        yield value
