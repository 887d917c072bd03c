"""Seconds of several functions, taken by turns so that a machine's moods fall on all alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.benchmark import Timer
from tqdm import trange


@dataclass(frozen=True)
class Time:
    """The median of several measurements and their quartiles: in seconds, or as a ratio.

    >>> Time.over(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    Time(median=3.0, low=2.0, high=4.0)
    """

    median: float
    low: float
    high: float

    @classmethod
    def over(cls, values: NDArray[np.float64]) -> "Time":
        low, median, high = np.percentile(values, [25, 50, 75]).tolist()
        return cls(median, low, high)

    @property
    def spread(self) -> float:
        """From one quartile to the other, as a share of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


def by_turns(
    functions: Sequence[Callable[[], Any]],
    *,
    rounds: int,
    min_block: float,
    progress: str | None = None,
) -> NDArray[np.float64]:
    """Seconds (rounds, functions) of one call of each, on torch's current number of threads.

    In every round each function is called for about `min_block` seconds; every other round goes
    backwards, so that no function always follows the same neighbour. `progress` is the title of a
    bar.
    """
    threads = torch.get_num_threads()
    # torch's own timer waits for GPUs, holds off the garbage collector and warms up.
    timers = [Timer("f()", globals={"f": f}, num_threads=threads) for f in functions]
    repeats = [max(1, round(min_block / timer.timeit(1).mean)) for timer in timers]
    seconds = np.empty((rounds, len(timers)))
    order = list(range(len(timers)))
    for i in trange(rounds, desc=progress, leave=False, disable=progress is None):
        for j in order:
            seconds[i, j] = timers[j].timeit(repeats[j]).mean
        order.reverse()
    return seconds


def ratio(seconds: NDArray[np.float64], of: int, to: int) -> Time:
    """The ratio of two columns, taken within each round."""
    return Time.over(seconds[:, of] / seconds[:, to])
