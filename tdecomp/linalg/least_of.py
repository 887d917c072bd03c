"""The least value of a function over a few candidates in order."""

from collections.abc import Callable, Sequence
from functools import cache


def least_of(candidates: Sequence[float], value: Callable[[float], float], start: float) -> float:
    """The candidate whose neighbours have no smaller value, found step by step from `start` on."""
    known, place = cache(value), candidates.index(start)
    while True:
        near = [i for i in (place, place - 1, place + 1) if 0 <= i < len(candidates)]
        best = min(near, key=lambda i: known(candidates[i]))
        if best == place:
            return candidates[place]
        place = best
