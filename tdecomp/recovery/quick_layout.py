"""Whether models take images in the layout in which training them takes about half the time."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tdecomp.calibration.passes import BatchError, Batches
from tdecomp.model.batches import tensors_of
from tdecomp.model.example import images_in_layout


def take_channels_last(batches: Batches, models: Iterable[nn.Module], batch: Any) -> bool:
    """Whether all these models run on this batch with its images, which it has, channels last."""
    if not any(x.dim() == 4 for x in tensors_of(batch)):
        return False
    batch = images_in_layout(batch, "channels_last")
    try:
        for model in models:
            with torch.no_grad():
                batches.run(model, batch)
    except BatchError:
        return False
    return True
