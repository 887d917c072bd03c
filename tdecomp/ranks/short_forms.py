"""The short forms that a user may write for the rank selectors."""

import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from tdecomp.ranks.base import RankSelector
from tdecomp.ranks.breakeven import BreakEven
from tdecomp.ranks.fixed import ByLayer, Fixed
from tdecomp.ranks.ratio import Ratio
from tdecomp.ranks.vbmf import VBMF

# The selectors that can be given by name.
_NAMED: dict[str, type[RankSelector]] = {"vbmf": VBMF, "breakeven": BreakEven}


def get_selector(rank: Any) -> RankSelector:
    """The selector that a short form stands for; a selector is returned as it is."""
    if isinstance(rank, RankSelector):
        return rank
    if isinstance(rank, str):
        if rank not in _NAMED:
            raise ValueError(f"unknown rank selector {rank!r}: expected {_EXPECTED}")
        return _NAMED[rank]()
    if isinstance(rank, Mapping):
        return ByLayer({pattern: _entry(pattern, value) for pattern, value in rank.items()})
    if isinstance(rank, Integral):
        return Fixed(rank if isinstance(rank, bool) else int(rank))
    if isinstance(rank, float) and not math.isnan(rank):
        if rank == 1.0:
            raise ValueError(
                "rank=1.0 could mean rank 1 or the full rank: write 1 or "
                "tdecomp.Ratio(1.0, of='rank')"
            )
        if 0 < rank < 1:
            return Ratio(rank, of="rank")
    elif isinstance(rank, (list, tuple)):
        whole = (r if isinstance(r, bool) or not isinstance(r, Integral) else int(r) for r in rank)
        return Fixed(tuple(whole))
    raise ValueError(f"rank: expected {_EXPECTED}, got {rank!r}")


def _entry(pattern: Any, value: Any) -> RankSelector:
    if not isinstance(pattern, str):
        raise TypeError(f"rank: expected layer names or globs as keys, got {pattern!r}")
    try:
        return get_selector(value)
    except ValueError as error:
        raise ValueError(f"layer {pattern!r}: {error}") from error


_EXPECTED = (
    "a positive int, a pair of them for Tucker-2, a float above 0 and below 1, one of "
    f"{', '.join(map(repr, _NAMED))}, a selector such as Ratio(0.5, of='macs'), "
    "Budget(macs=0.5), Energy(0.9) or VBMF(weaken=0.5), or a dict of layer names or globs to "
    "any of these but a Budget, which is for the whole model"
)
