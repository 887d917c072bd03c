"""Whether kernels are stored with their channels last."""

from collections.abc import Iterable

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last_of(weights: Iterable[Tensor]) -> torch.memory_format | None:
    """The format in which one of the weights is stored, if that has channels last; else None."""
    for weight in weights:
        last = _CHANNELS_LAST.get(weight.dim())
        # A kernel of size 1 is contiguous in every format, which says nothing about the layer.
        if last and not weight.is_contiguous() and weight.is_contiguous(memory_format=last):
            return last
    return None
