"""Memory layouts of images and kernels, by the names that torch gives them."""

import torch
from torch import Tensor, nn

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def layout_of(model: nn.Module) -> str:
    """The layout that most of the model's kernels are stored in."""
    kernels = [p for p in model.parameters() if p.dim() == 4]
    # For each, whether it is stored in each of LAYOUTS; kernels of 1×1 are in both.
    stored = [tuple(p.is_contiguous(memory_format=f) for f in LAYOUTS.values()) for p in kernels]
    last = stored.count((False, True)) > stored.count((True, False))
    return "channels_last" if last else "contiguous"


def in_layout(module: nn.Module, layout: str) -> nn.Module:
    """The module itself, its kernels now stored in this layout."""
    return module.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload,no-any-return]


def image_in_layout(tensor: Tensor, layout: str) -> Tensor:
    """A batch of images in this layout, copied only if needed; other tensors as they are."""
    return tensor.contiguous(memory_format=LAYOUTS[layout]) if tensor.dim() == 4 else tensor
