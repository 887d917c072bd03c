"""The ranks of a method that are worth a look: few, and whole multiples of what hardware likes."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tdecomp.layers.chain import Rank
from tdecomp.layers.cost import Cost

# A rank that is not forced to be a multiple shall still have so many values to choose from.
_CHOICES = 4


@dataclass(frozen=True)
class Rounding:
    """Which multiples ranks are rounded to.

    >>> Rounding(16).of(256), Rounding(16).of(24), Rounding(16, forced=True).of(24)
    (16, 4, 16)

    Attributes
    ----------
    multiple : int
    forced : bool
        Also where few such ranks are left; a rank whose largest is below the multiple is then
        the largest itself. Otherwise the multiple is halved there.
    """

    multiple: int = 1
    forced: bool = False

    def of(self, largest: int) -> int:
        """The multiple for ranks up to the largest."""
        multiple = self.multiple
        if self.forced:
            return min(multiple, largest)
        while multiple > 1 and _CHOICES * multiple > largest:
            multiple //= 2
        return multiple

    def nearest(self, rank: Rank, largest: Rank) -> Rank:
        """The rank of that kind next to this one, or ranks next to these."""
        if isinstance(rank, tuple):
            assert isinstance(largest, tuple)
            return tuple(self._nearest(r, most) for r, most in zip(rank, largest, strict=True))
        assert isinstance(largest, int)
        return self._nearest(rank, largest)

    def _nearest(self, rank: int, largest: int) -> int:
        multiple = self.of(largest)
        return min(max(1, round(rank / multiple)), largest // multiple) * multiple


ANY_RANK = Rounding()


def rank_steps(
    largest: Rank,
    cost: Callable[[Rank], Cost],
    limit: float,
    smallest: float,
    count: int,
    rounding: Rounding = ANY_RANK,
) -> list[Rank]:
    """At most about `count` ranks whose cost is within the limit, ascending, on a log scale.

    Several ranks go along a common fraction of their largest.

    Parameters
    ----------
    smallest : float
        Where to begin, as a share: of the largest rank within the limit, or of the limit itself
        where there are several ranks; 0 is rank 1.
    """
    if isinstance(largest, int):
        most = last(0, largest, lambda rank: cost(rank).deciding <= limit)
        ranks: list[Rank] = list(_spaced(math.ceil(smallest * most), most, count))
    else:
        descent = _common_fractions(largest, cost, 2 * count)
        within = [r for r in descent if smallest * limit <= cost(r).deciding <= limit]
        ranks = [within[i - 1] for i in _spaced(1, len(within), count)]
    rounded = dict.fromkeys(rounding.nearest(rank, largest) for rank in ranks)
    paying = (rank for rank in rounded if cost(rank).deciding <= limit)
    return sorted(paying, key=lambda rank: cost(rank).deciding)


def last(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The last whole number of a range that fits, where all up to it do; at least the first."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _spaced(low: int, high: int, count: int) -> list[int]:
    """At most so many whole numbers from `low` to `high`, evenly spaced on a log scale."""
    if high < 1:
        return []
    low = max(1, min(low, high))
    return sorted({round(x) for x in np.geomspace(low, high, count).tolist()})


def _common_fractions(
    largest: tuple[int, ...], cost: Callable[[Rank], Cost], count: int
) -> list[Rank]:
    """Ranks from the smallest to the largest, along a common fraction."""
    fractions = np.geomspace(1 / max(largest), 1.0, count).tolist()
    ranks: dict[Rank, None] = {}
    for fraction in fractions:
        ranks[tuple(max(1, round(fraction * limit)) for limit in largest)] = None
    return sorted(ranks, key=lambda rank: cost(rank).deciding)
