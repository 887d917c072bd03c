"""The precision in which a layer's errors are computed."""

import torch
from torch import Tensor

from tdecomp.linalg.leading_outputs import is_large_kernel

_ROWS, _ENTRIES = 512, 2**22  # of a large kernel that are converted at a time, at most


def precision_of(weight: Tensor) -> torch.dtype:
    """Of a layer's kernels, in which its errors are computed: float64 but for large layers."""
    large = weight.dtype != torch.float64 and is_large_kernel(weight)
    return torch.float32 if large else torch.float64


def difference(weight: Tensor, approximation: Tensor, *, overwrite: bool = False) -> Tensor:
    """What a weight loses with another in its place, in the precision of its kernels.

    With `overwrite` it may take the memory of the other one.
    """
    precision = precision_of(weight)
    if overwrite and approximation.dtype == precision == torch.float32:
        return approximation.detach().neg_().add_(weight.detach())
    return weight.detach().to(precision) - approximation.detach().to(precision)


def products(kernel: Tensor, mean: Tensor) -> Tensor:
    """``K m`` (out,) in float64, of which a large kernel gets no copy."""
    rows = max(1, min(_ROWS, _ENTRIES // max(1, kernel.shape[1])))
    return torch.cat([block.double() @ mean for block in kernel.split(rows)])
