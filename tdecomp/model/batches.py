"""A batch of inputs: how a model is called with it, its samples, its tensors, its device."""

import copy
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from functools import partial
from types import MemberDescriptorType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tdecomp.layers.patches import dense

# How a model is called with one batch.
Forward = Callable[[nn.Module, Any], Any]


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch as a loader yields it.

    A tuple or list usually holds inputs and labels: its first items are the arguments that the
    model's `forward` has no defaults for.
    """
    if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
        batch = tuple(batch[: _required(model, len(batch))])
    return call_with(model, batch)


def call_with(model: nn.Module, inputs: Any) -> Any:
    """The output for a tuple of positional arguments, a mapping of named ones, or the only one."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    several = isinstance(inputs, tuple) and not isinstance(inputs, PackedSequence)
    return model(*inputs) if several else model(inputs)


def _required(model: nn.Module, available: int) -> int:
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return available
    required = [p for p in parameters if p.default is p.empty]
    needed = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in required)
    return max(1, min(needed, available))


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def count_samples(batch: Any) -> int:
    """The length of the first tensor in a batch; 1 for a batch without tensors."""
    tensor = next(_tensors_in(batch), None)
    return tensor.size(0) if tensor is not None and tensor.dim() else 1


def tensors_of(output: Any) -> list[Tensor]:
    """Every floating-point tensor in a model's output, in the order of the output."""
    return [dense(tensor) for tensor in _tensors_in(output) if tensor.is_floating_point()]


def _tensors_in(value: Any) -> Iterator[Tensor]:
    return (held for held in _arrays_in(value) if isinstance(held, Tensor))


def _arrays_in(value: Any, within: tuple[int, ...] = ()) -> Iterator[Any]:
    """Tensors and NumPy arrays in containers and in attributes; `within` holds the ids around."""
    if isinstance(value, (Tensor, np.ndarray)):
        yield value
    elif id(value) not in within:
        for part in _parts(value):
            yield from _arrays_in(part, (*within, id(value)))


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list, deque, set, frozenset)):
        yield from value
    elif isinstance(value, Mapping):
        yield from value.values()
    else:
        yield from getattr(value, "__dict__", {}).values()
        yield from (held for held, _ in in_slots(value))


def in_slots(value: Any) -> Iterator[tuple[Any, Callable[[Any], None]]]:
    """What an object holds in its class's `__slots__`, each with the way to put another there."""
    for kind in type(value).__mro__:
        for slot in vars(kind).values() if "__slots__" in vars(kind) else ():
            if isinstance(slot, MemberDescriptorType):
                with suppress(AttributeError):  # it was never set
                    yield slot.__get__(value), partial(slot.__set__, value)


def in_parts(batch: Any, size: int, most: int) -> list[Any]:
    """The first `most` samples of a batch, `size` at a time; all of it if it cannot be cut.

    Cut is every tensor in plain containers that is as long as the first one.
    """
    samples = count_samples(batch)

    def cut(start: int, tensor: Tensor) -> Tensor:
        long = tensor.dim() > 0 and len(tensor) == samples
        return tensor[start : min(start + size, most)] if long else tensor

    starts = range(0, min(samples, most), size)
    parts = [each_tensor(batch, partial(cut, start)) for start in starts]
    return [batch] if samples <= size or count_samples(parts[0]) == samples else parts


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor on `device`."""

    def move(tensor: Tensor) -> Tensor:
        # No gradient shall reach the user's own tensors.
        there = tensor.detach() if tensor.requires_grad else tensor
        there = there.to(device, non_blocking=True)
        # Autograd refuses inference tensors.
        return there.clone() if there.is_inference() else there

    return each_tensor(batch, move)


def copied(batch: Any) -> Any:
    """The batch with copies of its tensors, for a model that changes its inputs in place."""
    return each_tensor(batch, torch.clone, _copied_object)


def _copied_object(value: Any) -> Any:
    """A copy of an object that holds tensors, such as a cache of keys; others as they are."""
    held = list(_arrays_in(value))
    if isinstance(value, nn.Module) or not held:
        return value
    try:  # `deepcopy` refuses to copy tensors that were computed with gradients
        return copy.deepcopy(value, {id(x): x.clone() for x in held if isinstance(x, Tensor)})
    except Exception:  # whatever its class raises: the model gets the object itself
        return value


def _same(value: Any) -> Any:
    return value


def each_tensor(
    value: Any, change: Callable[[Tensor], Tensor], other: Callable[[Any], Any] = _same
) -> Any:
    """The same containers with every tensor in them changed, and every other object by `other`.

    What is the same tensor in two places is so afterwards: attention tells by that what it attends.
    """
    changed: dict[int, Tensor] = {}

    def once(tensor: Tensor) -> Tensor:
        if id(tensor) not in changed:
            changed[id(tensor)] = change(tensor)
        return changed[id(tensor)]

    return _each(value, once, other)


def _each(value: Any, change: Callable[[Tensor], Tensor], other: Callable[[Any], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    each = partial(_each, change=change, other=other)
    if isinstance(value, Mapping):
        return _mapping_like(value, {key: each(item) for key, item in value.items()})
    if isinstance(value, PackedSequence):  # whose sizes stay on the CPU
        held = {name: each(item) for name, item in value._asdict().items() if name != "batch_sizes"}
        return value._replace(**held)
    if isinstance(value, tuple):
        return tuple_like(value, [each(item) for item in value])
    return [each(item) for item in value] if isinstance(value, list) else other(value)


def _mapping_like(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping of the same type, such as a tokenizer's output; a dict where it takes no items."""
    if type(value) is dict or not isinstance(value, MutableMapping):
        return items
    if isinstance(value, dict) or hasattr(value, "__copy__"):
        twin = copy.copy(value)
    else:  # its shallow copy would share what holds the items
        given = list(value.values())  # which live as long as their ids are used
        memo = {id(old): new for old, new in zip(given, items.values(), strict=True)}
        try:
            twin = copy.deepcopy(value, memo)
        except Exception:  # whatever its class raises
            return items
    for key, item in items.items():
        twin[key] = item
    return twin


def tuple_like(value: tuple[Any, ...], items: list[Any]) -> Any:
    """A tuple of the same type; a namedtuple takes its items one by one."""
    return getattr(type(value), "_make", type(value))(items)


def fingerprint(batch: Any) -> str:
    """What tells a batch from others: the shape and the sum of its first dense tensor."""
    for tensor in _tensors_in(batch):
        if tensor.layout == torch.strided and not tensor.is_nested:
            total = tensor.detach().cpu().to(torch.complex128).sum()
            return f"{tuple(tensor.shape)} {complex(total)}"
    return describe(batch)


def describe(value: Any) -> str:
    """A short description of inputs, for messages."""
    if isinstance(value, Tensor):
        shape = "several sizes" if value.is_nested else f"shape {tuple(value.shape)}"
        return f"{str(value.dtype).removeprefix('torch.')} tensor of {shape}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(describe, value)) + ")"
    return type(value).__name__
