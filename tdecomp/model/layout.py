"""Memory layouts of images and kernels, by the names that torch gives them."""

import torch
from torch import Tensor, nn

LAYOUTS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


def layout_of(model: nn.Module) -> str:
    """The layout that most of the model's kernels are stored in."""
    kernels = [p for p in model.parameters() if p.dim() == 4 and not p.is_contiguous()]
    last = [p for p in kernels if p.is_contiguous(memory_format=torch.channels_last)]
    ambiguous = (p for p in model.parameters() if p.dim() == 4 and p.is_contiguous())
    plain = sum(not p.is_contiguous(memory_format=torch.channels_last) for p in ambiguous)
    return "channels_last" if len(last) > plain else "contiguous"


def in_layout(module: nn.Module, layout: str) -> nn.Module:
    """The module itself, its kernels now stored in this layout."""
    return module.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload,no-any-return]


def image_in_layout(tensor: Tensor, layout: str) -> Tensor:
    """A batch of images in this layout, copied only if it is in another; other tensors as is."""
    return tensor.contiguous(memory_format=LAYOUTS[layout]) if tensor.dim() == 4 else tensor
