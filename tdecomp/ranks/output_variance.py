"""The smallest rank that keeps a share of each layer's output variance on data."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from tdecomp.layers.chain import Rank
from tdecomp.layers.cost import Cost
from tdecomp.ranks.base import NOTHING, Candidate, Choice, LocalSelector, check_share
from tdecomp.ranks.grid import ladder_of

# Of the output's variance: what an exact fit may lose by round-off.
_ROUND_OFF = 1e-9


@dataclass(frozen=True)
class OutputVariance(LocalSelector):
    """The smallest rank that keeps this share of the variance of the layer's output on `data`.

    >>> OutputVariance(0.95)
    OutputVariance(share=0.95)

    Exact for methods whose best fits are nested, svd and lowrank, and for split-svd, whose ranks
    are then those that lose least together. For all others the rank is found by bisection, with a
    fit at each step, assuming that the error falls with the rank. For Tucker-2 both ranks grow by a
    common fraction of their largest ones.

    A layer is left alone where its output error is not known: no batch reaches it, it is a
    transposed convolution, or the method cannot be fitted to data. So is one of which no rank
    keeps the share.

    Parameters
    ----------
    share : float
        Above 0 and at most 1.

    Raises
    ------
    ValueError
        If the share is out of range; and when planning, if no layer's outputs are known, as
        without ``data=``.
    """

    share: float

    def __post_init__(self) -> None:
        check_share("OutputVariance: expected a share", self.share)

    def select(self, sites: Sequence[Sequence[Candidate]], rest: Cost = NOTHING) -> list[Choice]:
        if sites and not any(candidates[0].by_outputs for candidates in sites):
            names = ", ".join(repr(candidates[0].layer) for candidates in sites[:3])
            more = f" and {len(sites) - 3} more" if len(sites) > 3 else ""
            raise ValueError(
                f"{self}: nothing is known of the outputs of {names}{more}; expected data=... "
                "(batches, or Moments) that reaches them, and methods that are fitted to data. "
                "Without data, Energy(...) keeps a share of the squared singular values"
            )
        return super().select(sites, rest)

    def choose(self, candidate: Candidate) -> Choice:
        if not candidate.by_outputs:
            return Choice(
                reason=f"the output error of {candidate.method} is not known: no batch reached the "
                "layer, it is transposed, or the method cannot be fitted to data"
            )
        ladder, exact, best = ladder_of(candidate), candidate.errors(), candidate.best_ranks()
        # Exact errors are those at rank 0, 1, 2 …; of a reduced chain only up to its own rank.
        errors: dict[Rank, float | None] = dict(best or enumerate(exact or ()))
        known = bool(errors)

        def keeps(rank: Rank) -> bool:
            if not known:
                errors[rank] = candidate.error_at(rank)
            error = errors[rank]
            return error is not None and error <= 1 - self.share + _ROUND_OFF

        if not known:
            place = bisect_left(ladder, True, key=keeps)
        else:
            place = next((i for i, rank in enumerate(ladder) if keeps(rank)), len(ladder))
        if place < len(ladder):
            return Choice(candidate, ladder[place], error=errors[ladder[place]])
        # A search that always goes up ends at the largest rank.
        error = errors.get(ladder[-1])
        failed = error is None or not math.isfinite(error)
        kept = "could not be fitted" if failed else f"keeps {1 - (error or 0.0):.1%}"
        return Choice(
            reason=f"no rank of {candidate.method} keeps {self.share:.1%} of the output variance: "
            f"its largest, {candidate.max_rank}, {kept}"
        )
