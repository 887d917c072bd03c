"""The rate that suits a training, found by a few steps whose rate rises.

Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3.
"""

from collections.abc import Callable, Sequence
from itertools import cycle, islice

import torch
from torch import Tensor

from tdecomp.recovery.adam import Adam, Coordinates

_STEPS = 12
_LOWEST, _HIGHEST = 5e-5, 1e-2
# A loss is the mean of as many, as batches gain unlike much.
_JOINED = 3
# It is over when the loss is so many times the least one.
_WORSE = 1.3
# A rate that falls in the end may be so many times the one that serves best while it rises.
_RISE = 1.5


def range_test(
    coordinates: Coordinates, losses: Sequence[Callable[[], Tensor]], device: torch.device
) -> float:
    """The rate after which the losses are least, beside those of the same batches before.

    `losses` are those of batches, with a graph for gradients; what is trained is afterwards as it
    was.
    """
    losses = losses[:_STEPS]
    with torch.no_grad():
        before = [float(loss()) for loss in losses]
    factor = (_HIGHEST / _LOWEST) ** (1 / (_STEPS - 1))
    adam = Adam.rising(coordinates, _LOWEST, factor)
    shares: list[float] = []
    best, least = 0, float("inf")
    with coordinates.restored(), torch.enable_grad():
        for loss, first in islice(cycle(zip(losses, before, strict=True)), _STEPS):
            found = loss()
            shares.append(float(found.detach()) / max(first, torch.finfo(torch.float32).tiny))
            mean = sum(shares[-_JOINED:]) / _JOINED
            if len(shares) >= _JOINED and mean < least:
                best, least = len(shares) - _JOINED, mean
            if mean > _WORSE * least or not found.requires_grad:
                break
            adam.step(found, device)
    return float(_RISE * _LOWEST * factor**best)
