"""Tensors as safetensors wants them, and those that it cannot hold."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tdecomp.model.weights import is_plain


def refuse_odd(state: Mapping[str, Any]) -> None:
    """Raise a ValueError for what safetensors cannot hold, by its name."""
    for key, value in state.items():
        if found := unsaved(value):
            words = (
                "only tensors can be saved, plain and dense and with values: save the model before "
                "it is quantized or sharded"
            )
            raise ValueError(f"{key!r} of the state dict is a {found}; {words}")


def unsaved(value: Any) -> str | None:
    """What it is, if safetensors cannot hold it; else None."""
    if not isinstance(value, Tensor) or not is_plain(value):
        return type(value).__name__
    dense = value.layout is torch.strided and not value.is_quantized and not value.is_meta
    if dense and value.dtype not in (torch.complex32, torch.complex128):
        return None
    return f"{value.dtype} tensor ({value.layout}, on {value.device})"


def buffers_beside(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The buffers that the state dict lacks, such as rotary frequencies, where they have values."""
    found = model.named_buffers(remove_duplicate=False)
    return {name: value for name, value in found if name not in state and not unsaved(value)}


def alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous and each in memory of its own, as safetensors wants them."""
    # torch negates and conjugates only when values are read, which safetensors does not.
    whole = {k: v.resolve_conj().resolve_neg().contiguous() for k, v in tensors.items()}
    places = Counter(value.untyped_storage().data_ptr() for value in whole.values())
    return {
        key: value.clone() if places[value.untyped_storage().data_ptr()] > 1 else value
        for key, value in whole.items()
    }


def is_dense(tensor: Tensor) -> bool:
    """Whether the strides are those of a permuted contiguous tensor."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def strides_of(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The strides of tensors that are permuted, as in channels_last, which no file keeps itself."""
    return {
        key: list(value.stride())
        for key, value in state.items()
        if is_dense(value) and value.stride() != torch.empty(value.shape, device="meta").stride()
    }
