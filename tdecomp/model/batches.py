"""A batch of inputs: how a model is called with it, its samples, its tensors, its device."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tdecomp.model.example import as_call, each_tensor
from tdecomp.model.layout import image_in_layout

# How a model is called with one batch.
Forward = Callable[[nn.Module, Any], Any]


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch as a loader yields it.

    A tensor is the input, a dict holds keyword arguments. A tuple or list usually holds inputs and
    labels: its first items are the arguments that the model's `forward` has no defaults for.
    """
    if isinstance(batch, (tuple, list)):
        return model(*batch[: _required(model, len(batch))])
    args, kwargs = as_call(batch)
    return model(*args, **kwargs)


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
    tensor = next(_tensors_in(batch, ()), None)
    return len(tensor) if tensor is not None and tensor.dim() else 1


def tensors_of(output: Any) -> list[Tensor]:
    """Every floating-point tensor in a model's output, in the order of the output."""
    return [tensor for tensor in _tensors_in(output, ()) if tensor.is_floating_point()]


def _tensors_in(value: Any, within: tuple[int, ...]) -> Iterator[Tensor]:
    """All tensors in containers and in attributes of objects, each object entered only once.

    `within` holds the ids of the containers and objects around `value`.
    """
    parts: Iterable[Any] = ()
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in within:
        if isinstance(value, Mapping):
            parts = value.values()
        elif isinstance(value, (tuple, list)):
            parts = value
        elif hasattr(value, "__dict__"):
            parts = vars(value).values()
    for part in parts:
        yield from _tensors_in(part, (*within, id(value)))


def in_parts(batch: Any, size: int, most: int) -> list[Any]:
    """The first `most` samples of a batch, `size` at a time.

    Every tensor that is as long as the first one is cut. A batch whose tensors are not in plain
    containers cannot be cut and is returned whole, as the only part.
    """
    samples = count_samples(batch)

    def part(start: int) -> Any:
        def cut(tensor: Tensor) -> Tensor:
            long = tensor.dim() > 0 and len(tensor) == samples
            return tensor[start : min(start + size, most)] if long else tensor

        return each_tensor(batch, cut)

    if samples <= size or count_samples(part(0)) == samples:
        return [batch]
    return [part(start) for start in range(0, min(samples, most), size)]


def channels_last(batch: Any) -> Any:
    """The batch with its images in the channels-last memory format.

    Convolutions keep this format, in which chains run and train much faster on CPUs. A model that
    calls `view` may reject it.
    """
    return each_tensor(batch, partial(image_in_layout, layout="channels_last"))


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor on `device`."""

    def move(tensor: Tensor) -> Tensor:
        # No gradient shall reach the user's own tensors.
        there = tensor.detach() if tensor.requires_grad else tensor
        there = there.to(device, non_blocking=True)
        # Autograd refuses inference tensors.
        return there.clone() if there.is_inference() else there

    return each_tensor(batch, move)
