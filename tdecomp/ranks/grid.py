"""Which ranks of a method are looked at: all of them in order, or a few of them, rounded."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tdecomp.layers.chain import Rank
from tdecomp.layers.cost import Cost
from tdecomp.ranks.base import Candidate, as_tuple, in_form_of

# How many multiples must be left to choose from where rounding is not forced.
_CHOICES = 4


@dataclass(frozen=True)
class Rounding:
    """Which multiples ranks are rounded to."""

    multiple: int = 1
    # Keep the multiple even where it leaves few ranks; a method whose largest rank is below the
    # multiple then has that rank only. Otherwise the multiple is halved for it.
    forced: bool = False

    def of(self, largest: int) -> int:
        """The multiple for ranks up to the largest."""
        if self.forced:
            return min(self.multiple, largest)
        multiple = self.multiple
        while multiple > 1 and _CHOICES * multiple > largest:
            multiple //= 2
        return multiple

    def nearest(self, rank: Rank, largest: Rank) -> Rank:
        """The multiple nearest to the rank, or to each rank of a tuple."""
        pairs = zip(as_tuple(rank), as_tuple(largest), strict=True)
        return in_form_of(largest, (self._nearest(r, most) for r, most in pairs))

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
    """About `count` ranks at most, ascending, whose cost is within the limit.

    `smallest` is where to begin, as a share: of the largest rank within the limit, or of the limit
    itself where there are several ranks; 0 is rank 1. Several ranks are a common fraction of their
    largest ones.
    """

    def size(rank: Rank) -> int:
        return cost(rank).amount

    if isinstance(largest, int):
        most = last(0, largest, lambda rank: size(rank) <= limit)
        ranks: list[Rank] = list(_spaced(math.ceil(smallest * most), most, count))
    else:
        fractions = [rank / max(largest) for rank in _spaced(1, max(largest), 2 * count)]
        scaled: Iterable[Rank] = dict.fromkeys(
            tuple(max(1, round(fraction * most)) for most in largest) for fraction in fractions
        )
        within = [r for r in sorted(scaled, key=size) if smallest * limit <= size(r) <= limit]
        places = np.linspace(0, len(within) - 1, min(count, len(within)))
        ranks = [within[round(place)] for place in places.tolist()]
    rounded = dict.fromkeys(rounding.nearest(rank, largest) for rank in ranks)
    return sorted((rank for rank in rounded if size(rank) <= limit), key=size)


def steps_along(
    ranks: Sequence[Rank], cost: Callable[[Rank], Cost], limit: float, count: int
) -> list[Rank]:
    """About `count` of these ranks at most, whose costs ascend, within the limit."""
    most = last(0, len(ranks), lambda place: cost(ranks[place - 1]).amount <= limit)
    return [ranks[place - 1] for place in _spaced(1, most, count)]


def rank_at(max_rank: Rank, fraction: float | Fraction) -> Rank:
    """That fraction of the largest useful rank, or of each one: rounded down, at least 1."""
    return in_form_of(max_rank, (max(1, int(fraction * limit)) for limit in as_tuple(max_rank)))


def rank_ladder(max_rank: Rank) -> Sequence[Rank]:
    """Every rank that a common fraction of the largest ones gives, ascending."""
    if isinstance(max_rank, int):
        return range(1, max_rank + 1)
    fractions = {Fraction(r, limit) for limit in max_rank for r in range(1, limit + 1)}
    return sorted({rank_at(max_rank, fraction) for fraction in fractions})


def ladder_of(candidate: Candidate) -> Sequence[Rank]:
    """The ranks that lose least together where they are known, else those of `rank_ladder`."""
    best = candidate.best_ranks()
    return rank_ladder(candidate.max_rank) if best is None else [*best]


def largest_rank(candidate: Candidate, fits: Callable[[Cost], bool]) -> Rank | None:
    """The largest rank of the ladder whose cost `fits`, or None; costs grow along the ladder."""
    ladder = ladder_of(candidate)
    count = bisect_left(ladder, True, key=lambda rank: not fits(candidate.cost(rank)))
    return ladder[count - 1] if count else None


def last(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number from `low` to `high` that fits, as all below it must; else `low`."""
    return low + bisect_left(range(low + 1, high + 1), True, key=lambda number: not fits(number))


def _spaced(low: int, high: int, count: int) -> list[int]:
    """At most `count` whole numbers from `low` to `high`, evenly spaced in their cube roots.

    Steps on a log scale are wide near `high`, where large budgets choose; even ones near 1.
    """
    if high < 1:
        return []
    low = max(1, min(low, high))
    return sorted(
        {round(x) for x in (np.linspace(np.cbrt(low), np.cbrt(high), count) ** 3).tolist()}
    )
