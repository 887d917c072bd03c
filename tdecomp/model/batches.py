"""Unlabelled batches: where they come from, how a model is called with them, on which device."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tdecomp.model.example import as_call, describe, each_tensor

# How a model is called with one batch.
Forward = Callable[[nn.Module, Any], Any]


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch as a loader yields it.

    >>> call_model(nn.Linear(2, 1), [torch.zeros(4, 2), "labels"]).shape
    torch.Size([4, 1])

    A tensor is the input, a dict holds keyword arguments. Of a tuple or list, as loaders make them
    of inputs and labels, the model gets as many items as its `forward` cannot do without.
    """
    if isinstance(batch, (tuple, list)):
        return model(*batch[: _required(model, len(batch))])
    args, kwargs = as_call(batch)
    return model(*args, **kwargs)


def _required(model: nn.Module, available: int) -> int:
    parameters = list(inspect.signature(model.forward).parameters.values())
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return available
    needed = sum(
        p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
        for p in parameters
    )
    return max(1, min(needed, available))


class Batches:
    """Batches that can be gone through several times, each on the model's device.

    >>> [x.shape for x in Batches([torch.zeros(2, 3)], "example").on(torch.device("cpu"))]
    [torch.Size([2, 3])]

    Parameters
    ----------
    data : Tensor, dict or iterable of batches
        A single tensor or dict is one batch.
    wanted_by : str
        Who asks, for messages.
    forward : callable ``(model, batch) -> output``, optional
        How the model is called; see `call_model` for what is done otherwise.
    max_batches : int, optional
    """

    def __init__(
        self,
        data: Any,
        wanted_by: str,
        forward: Forward | None = None,
        max_batches: int | None = None,
    ) -> None:
        if isinstance(data, (Tensor, dict)):
            data = [data]
        if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
            raise TypeError(
                f"{wanted_by}: expected batches (a DataLoader, or an iterable of tensors, tuples "
                f"or dicts), got {type(data).__name__}"
            )
        whole = isinstance(max_batches, int) and not isinstance(max_batches, bool)
        if max_batches is not None and not (whole and max_batches >= 1):
            raise ValueError(
                f"{wanted_by}: expected max_batches to be a whole number of at least 1, got "
                f"{max_batches!r}"
            )
        self._data: Iterable[Any] = data
        self._wanted_by = wanted_by
        self._forward = forward or call_model
        self._limit = max_batches

    def again(self, reason: str) -> None:
        """Refuse data that can be gone through only once, where more is needed."""
        if iter(self._data) is self._data:
            raise ValueError(
                f"{self._wanted_by}: {reason} goes through the batches more than once, got "
                f"{type(self._data).__name__}, which yields them only once; expected a DataLoader "
                "or a list"
            )

    def __len__(self) -> int:
        """How many there are; 0 if the data cannot tell."""
        known = len(self._data) if isinstance(self._data, Sized) else 0
        return min(known, self._limit) if self._limit is not None else known

    def on(self, device: torch.device) -> Iterator[Any]:
        """Yield the batches, every tensor in them on `device`."""
        seen = False
        for batch in islice(self._data, self._limit):
            seen = True
            yield _moved(batch, device)
        if not seen:
            raise ValueError(
                f"{self._wanted_by}: got no batches; expected at least one (an exhausted generator "
                "looks like this too: pass a DataLoader or a list)"
            )

    def bar(self, device: torch.device, title: str, progress: bool) -> Iterator[Any]:
        """`on`, with a progress bar."""
        total = len(self) or None
        yield from tqdm(
            self.on(device), desc=title, total=total, unit="batch", disable=not progress
        )

    def run(self, model: nn.Module, batch: Any) -> Any:
        """The model's output for one batch.

        Raises
        ------
        ValueError
            If the model rejects the batch.
        """
        try:
            return self._forward(model, batch)
        except BatchError:
            raise
        except Exception as error:
            raise BatchError(
                f"{self._wanted_by}: the model rejected a batch ({describe(batch)}): "
                f"{type(error).__name__}: {error}. Expected what the model takes as its first "
                "argument, a tuple that starts with it, or a dict of keyword arguments; "
                "forward=lambda model, batch: ... says how else to call it"
            ) from error


class BatchError(ValueError):
    """A batch that cannot be used."""


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer is; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def count_samples(batch: Any) -> int:
    """The first dimension of the first tensor in a batch; 1 for a batch that holds none."""
    tensor = next(_tensors_in(batch, ()), None)
    return len(tensor) if tensor is not None and tensor.dim() else 1


def tensors_of(output: Any) -> list[Tensor]:
    """Every floating-point tensor in a model's output, in its own order."""
    return [tensor for tensor in _tensors_in(output, ()) if tensor.is_floating_point()]


def _tensors_in(value: Any, within: tuple[int, ...]) -> Iterator[Tensor]:
    """All tensors in containers and in attributes of objects; `within` are those around it."""
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in within:  # an object that holds itself
        return
    if isinstance(value, Mapping):
        parts: Iterable[Any] = value.values()
    elif isinstance(value, (tuple, list)):
        parts = value
    else:
        parts = vars(value).values() if hasattr(value, "__dict__") else ()
    for part in parts:
        yield from _tensors_in(part, (*within, id(value)))


def in_parts(batch: Any, size: int, most: int) -> list[Any]:
    """The first `most` samples of a batch, `size` at a time.

    >>> [len(x) for x, _ in in_parts((torch.zeros(9, 2), torch.zeros(9)), 4, 7)]
    [4, 3]

    Cut are all tensors that are as long as the first one. A batch of another kind than tensors in
    containers is one part, as it is.
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
    """The batch with the channels of its images next to each other in memory.

    The models' convolutions then keep that layout, in which chains run and train much faster on
    CPUs. A model that calls `view` may not take it.
    """

    def lay_out(tensor: Tensor) -> Tensor:
        image = tensor.dim() == 4
        return tensor.contiguous(memory_format=torch.channels_last) if image else tensor

    return each_tensor(batch, lay_out)


def _moved(batch: Any, device: torch.device) -> Any:
    def move(tensor: Tensor) -> Tensor:
        moved = tensor.to(device, non_blocking=True)
        # Inference tensors can take no part in what gradients are taken of.
        return moved.clone() if moved.is_inference() else moved

    return each_tensor(batch, move)
