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
    """What one forward pass of the example inputs showed, by the names of the layers."""

    calls: Mapping[str, list[Call]]  # of each watched layer; empty if it never ran
    total_macs: int  # of the whole pass, by torch's flop counter
    # How a layer is used, if in another way than by calling it with its input.
    oddities: Mapping[str, str]


def trace(model: nn.Module, specs: Mapping[str, LayerSpec], example_inputs: Any) -> Trace:
    """Run `model` once on an example, in eval mode without gradients, and watch some layers.

    Training modes, buffers and the random state are restored. A model that rejects the inputs
    raises a ValueError.
    """
    example = Example.of(example_inputs)
    layers = {m: name for name, m in model.named_modules() if name in specs}
    calls: dict[str, list[Call]] = {name: [] for name in specs}
    oddities: dict[str, str] = {}
    reads = _WeightReads(layers)
    counter = FlopCounterMode(display=False)

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = layers[layer]
        reads.running.append(name)
        value, *extra = (*args, *kwargs.values()) or (None,)
        if extra:
            oddities[name] = "it is called with more than its input"
        if isinstance(value, Tensor):  # if not, the layer itself is about to complain
            calls[name].append(specs[name].call(value.shape))

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
    for name in reads.elsewhere:
        oddities.setdefault(name, "its weight is read outside its own forward")
    return Trace(calls, counter.get_total_flops() // 2, oddities)


class _WeightReads(TorchFunctionMode):
    """Finds weights that a torch function is given while their own layer is not running."""

    def __init__(self, layers: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self.running: list[str] = []
        self.elsewhere: set[str] = set()
        parameters = ((p, name) for m, name in layers.items() for p in m.parameters(recurse=False))
        self._owners = {id(p): name for p, name in parameters}

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
