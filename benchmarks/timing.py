"""Measured latency of several models, interleaved so that a machine's moods fall on all alike."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from tqdm import trange


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
    timers = {
        name: Timer(
            "model(x)", globals={"model": model, "x": x}, num_threads=torch.get_num_threads()
        )
        for name, model in models.items()
    }
    repeats = {name: _repeats(timer, min_block) for name, timer in timers.items()}
    quiet = None if progress else True  # None: only where there is no terminal
    seconds = np.empty((rounds, len(timers)))
    order = list(enumerate(timers))
    for i in trange(rounds, desc="latency", leave=False, disable=quiet):
        for j, name in order:
            seconds[i, j] = timers[name].timeit(repeats[name]).mean
        order.reverse()  # so that no model always follows the same neighbour
    ratios = seconds / seconds[:, :1]
    return {
        name: Latency(*_summary(seconds[:, j]), *_summary(ratios[:, j]))
        for j, name in enumerate(timers)
    }


def _repeats(timer: Timer, min_block: float) -> int:
    """How many passes fill a block; this is the warm-up, too."""
    timer.timeit(2)
    return max(1, round(min_block / timer.timeit(3).mean))


def _summary(values: np.ndarray) -> tuple[float, tuple[float, float]]:
    low, median, high = np.percentile(values, [25, 50, 75])
    return float(median), (float(low), float(high))
