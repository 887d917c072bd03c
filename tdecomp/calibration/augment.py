"""Random variants of images, so that few of them show more of what the original model does."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tdecomp.model.batches import each_tensor

Augment = Callable[[Any, torch.Generator], Any]  # varies a batch at random

_LEAST_SIDE = 8  # tensors with a shorter side than this are not taken for images
_SHIFT = 1 / 8  # the largest one, as a share of the shorter side
# The share of images that get a part of another image, and the largest share of its area.
_PASTED = 0.5
_LARGEST_PART = 0.5


def flip_and_shift(batch: Any, generator: torch.Generator) -> Any:
    """Mirror each image of a batch or not, and shift it a little, at random.

    >>> flip_and_shift(torch.ones(2, 3, 8, 8), torch.Generator()).shape
    torch.Size([2, 3, 8, 8])

    No label can become wrong by this, as the original model's outputs are the targets. Only
    floating tensors (batch, channels, height, width) of at least 8×8 in `batch` are taken for
    images; everything else is returned as it is. `generator` draws what is random.
    """
    return _each_image_tensor(batch, _varied, generator)


def paste(batch: Any, generator: torch.Generator) -> Any:
    """Paste a rectangle of another image of the batch into about half of the images, at random.

    Yun et al. 2019, "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable
    Features", without labels: the targets are the original model's outputs for the mixture.
    """
    return _each_image_tensor(batch, _pasted, generator)


def _each_image_tensor(batch: Any, vary: Augment, generator: torch.Generator) -> Any:
    def change(x: Tensor) -> Any:
        images = x.dim() == 4 and x.is_floating_point() and min(x.shape[2:]) >= _LEAST_SIDE
        return vary(x, generator) if images else x

    return each_tensor(batch, change)


def _varied(batch: Tensor, generator: torch.Generator) -> Tensor:
    count, _, height, width = batch.shape
    mirrored = torch.rand(count, generator=generator, device="cpu") < 0.5
    batch = torch.where(mirrored.to(batch.device)[:, None, None, None], batch.flip(-1), batch)
    most = int(_SHIFT * min(height, width))
    padded = functional.pad(batch, (most,) * 4, mode="reflect")
    last = 2 * most + 1
    corners = torch.randint(0, last, (count, 2), generator=generator, device="cpu").tolist()
    crops = zip(padded, corners, strict=True)
    return torch.stack([x[:, top : top + height, left : left + width] for x, (top, left) in crops])


def _pasted(batch: Tensor, generator: torch.Generator) -> Tensor:
    count, _, height, width = batch.shape
    others = torch.randperm(count, generator=generator, device="cpu").tolist()
    draws = torch.rand(count, 4, generator=generator, dtype=torch.float64, device="cpu").tolist()
    mixed = batch.clone()
    for image, (other, (chance, area, down, across)) in enumerate(zip(others, draws, strict=True)):
        if chance < _PASTED:
            side = (_LARGEST_PART * area) ** 0.5
            rows, columns = max(1, round(side * height)), max(1, round(side * width))
            top, left = int(down * (height - rows + 1)), int(across * (width - columns + 1))
            part = (slice(None), slice(top, top + rows), slice(left, left + columns))
            mixed[image][part] = batch[other][part]
    return mixed
