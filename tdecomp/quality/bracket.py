"""Where to look next for the smallest share that is good enough."""

import math

_FIRST = 0.5
_CLOSE = 1.02  # the ratio of a share that is good enough to one that is not, at which to stop
# How far from the ends of the bracket the next share stays, as a share of its length.
_INSIDE = 0.1
_LEAST_USED = 0.05  # less of what may be lost is taken for this much: it may be 0 or below


class Bracket:
    """The smallest share known to be good enough, and the largest below it known not to be.

    What is lost is taken to grow towards smaller shares, about as a power of the share, which is
    what it does on networks from half their MACs downwards. This decides only where to look.
    """

    def __init__(self) -> None:
        self._high, self._used_high = 1.0, 0.0  # the original itself
        self._low, self._used_low = 0.0, math.inf
        self._floor = 0.0  # no share below it can be reached
        self._moves: list[bool] = []

    def next_share(self) -> float | None:
        """The share to try next; None where the bracket is narrow enough."""
        low, high = max(self._low, self._floor), self._high
        if high <= _CLOSE * low:
            return None
        if self._low < self._floor or not low:  # nothing has failed yet
            return max(high / 2 if self._moves else _FIRST, self._floor)
        length = math.log(high / low)
        return high * math.exp(-length * self._fraction())

    def add(self, share: float, used: float) -> None:
        """What a share uses of what may be lost: more than 1 is too much."""
        kept = used <= 1
        self._moves.append(kept)
        if kept:
            self._high, self._used_high = share, used
        else:
            self._low, self._used_low = share, used

    def raise_floor(self, share: float) -> None:
        """No share below this one can be reached."""
        self._floor = max(self._floor, share)

    def _fraction(self) -> float:
        """How far to go from the upper end to the lower one, in the logarithm of the share."""
        one_sided = len(self._moves) > 2 and len({*self._moves[-2:]}) == 1
        if one_sided or not math.isfinite(self._used_low):
            return 0.5
        above, below = (math.log(max(u, _LEAST_USED)) for u in (self._used_high, self._used_low))
        return min(max(-above / (below - above), _INSIDE), 1 - _INSIDE)
