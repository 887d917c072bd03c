"""A value on its way to a worker, as plain bytes wherever an executor pickles it.

Left to itself, a process pool moves the storage of every tensor into shared memory, the model's
own included, and keeps a file open for each; and what a worker fails to read ends the worker.
"""

import importlib
import io
import pickle
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, Generic, TypeVar
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor, nn

Value = TypeVar("Value")
_PROTOCOL = 5  # the first with buffers that are not copied


class Parcel(Generic[Value]):
    """A value, itself within this process.

    Its text names it in errors: that of the value, or of what the value was made of.
    """

    def __init__(self, value: Value, made_of: object = None) -> None:
        self._value, self._made_of = value, made_of

    def __str__(self) -> str:
        return str(self._value if self._made_of is None else self._made_of)

    def open(self) -> Value:
        """The value."""
        return self._value

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        data, buffers = self._dumped()
        if protocol < _PROTOCOL:
            return SealedParcel, (str(self), data, list(map(bytes, buffers)))
        return SealedParcel, (str(self), data, buffers)

    def _dumped(self) -> tuple[bytes, list[pickle.PickleBuffer]]:
        file, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
        try:
            _pickler()(file, protocol=_PROTOCOL, buffer_callback=buffers.append).dump(self._value)
        except Exception as error:
            raise TypeError(
                f"{self}: it cannot be sent between processes, {type(error).__name__}: {error}; "
                "expected your own methods, layer kinds and selectors to be defined at the top "
                "level of a module, of values that can be pickled. An executor of threads takes "
                "anything"
            ) from error
        return file.getvalue(), buffers

    def __dask_tokenize__(self) -> str:
        """Dask names a task by a hash of what it is given: each parcel is one of its own."""
        return uuid4().hex


class SealedParcel(Parcel[Value]):
    """A value as bytes, as it arrived."""

    def __init__(self, text: str, data: bytes, buffers: Sequence[Any]) -> None:
        self._text, self._data, self._buffers = text, data, buffers

    def __str__(self) -> str:
        return self._text

    def open(self) -> Value:
        """The value; a ValueError if something that it is made of is not known here."""
        try:
            value: Value = pickle.loads(self._data, buffers=self._buffers)
        except Exception as error:
            raise ValueError(
                f"{self}: a worker cannot read what it was sent, "
                f"{type(error).__name__}: {error}; expected this version of tdecomp in every "
                "worker, and the modules that define your own methods, layer kinds and selectors "
                "where it can import them (PYTHONPATH; Client.upload_file with Dask)"
            ) from error
        return value

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """As it arrived: Dask may pass it on from one worker to another."""
        del protocol
        return SealedParcel, (self._text, self._data, list(map(bytes, self._buffers)))


@cache
def _pickler() -> Any:
    """Dask's pickler where it is installed: that sends what is defined in a notebook, too."""
    base: Any = pickle.Pickler
    with suppress(ImportError):
        base = importlib.import_module("cloudpickle").Pickler

    class TensorPickler(base):  # type: ignore[misc]
        """Pickles the values of tensors, and nothing else of their storage; tied ones once."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._written: dict[Any, Tensor] = {}  # by their place in memory

        def reducer_override(self, value: Any) -> Any:
            if type(value) in (Tensor, nn.Parameter) and value.device.type == "cpu":
                flat, shape, order = _flattened(value)
                place = flat.data_ptr(), flat.numel(), flat.dtype
                written = self._written.setdefault(place, flat)
                if written is value:
                    return _flat, (value.dtype, _bytes_of(written))
                return _shaped, (written, shape, order)
            other = getattr(super(), "reducer_override", None)
            return NotImplemented if other is None else other(value)

    return TensorPickler


def _flattened(tensor: Tensor) -> tuple[Tensor, tuple[int, ...], list[int]]:
    """The values in the order of their memory: strides decide how products are rounded."""
    values = tensor.detach()
    order = sorted(range(values.dim()), key=values.stride, reverse=True)
    ordered = values.permute(order).contiguous()
    return ordered.view(-1), tuple(ordered.shape), order


def _bytes_of(flat: Tensor) -> pickle.PickleBuffer:
    data: Any = flat.view(torch.uint8).numpy()
    return pickle.PickleBuffer(data)


def _flat(dtype: torch.dtype, data: Any) -> Tensor:
    """In memory of torch's own, as aligned as the original's."""
    taken = np.frombuffer(data, dtype=np.uint8)
    values = torch.empty(len(taken) // dtype.itemsize, dtype=dtype, device="cpu")
    values.view(torch.uint8).numpy()[:] = taken
    return values


def _shaped(flat: Tensor, shape: tuple[int, ...], order: list[int]) -> Tensor:
    return flat.view(shape).permute([order.index(place) for place in range(len(order))])
