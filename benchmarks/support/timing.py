"""Measured latency of several models, interleaved so that noise affects all alike."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tdecomp.timing.speed import Quartiles
from tdecomp.timing.stopwatch import interleaved, ratio


@dataclass(frozen=True)
class Latency:
    """One model's seconds for a forward pass, and those seconds as a ratio of the first model's."""

    median: float
    quartiles: tuple[float, float]
    ratio: float
    ratio_quartiles: tuple[float, float]


@torch.inference_mode()
def interleaved_latencies(
    models: Mapping[str, nn.Module],
    x: Tensor,
    *,
    rounds: int = 15,
    min_block: float = 0.05,
    progress: bool = False,
) -> dict[str, Latency]:
    """Time every model once a round, for about `min_block` seconds, on torch's current threads.

    The first model is the reference: ratios are taken within a round, medians over the rounds.
    """
    seconds = interleaved(
        [partial(model, x) for model in models.values()],
        rounds=rounds,
        min_block=min_block,
        progress="latency" if progress else None,
    )
    found = {}
    for i, name in enumerate(models):
        time, share = Quartiles.over(seconds[:, i]), ratio(seconds, i, 0)
        quartiles = ((time.low, time.high), (share.low, share.high))
        found[name] = Latency(time.median, quartiles[0], share.median, quartiles[1])
    return found
