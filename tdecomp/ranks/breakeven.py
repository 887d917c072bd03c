"""The largest rank that still pays."""

from dataclasses import dataclass

from tdecomp.layers.cost import LookupCost
from tdecomp.ranks.base import Candidate, Choice, LocalSelector
from tdecomp.ranks.grid import largest_rank, rank_at


@dataclass(frozen=True)
class BreakEven(LocalSelector):
    """The largest rank at which the chain needs strictly fewer MACs than the layer.

    >>> BreakEven()
    BreakEven()

    Each stage is counted at its own output size on the example inputs; without them parameters are
    counted, and the row says so. At stride 1 this is, with F = fan_in and T outputs: for svd and
    lowrank ceil(F · T / (F + T)) − 1; for cp, with S inputs and k kernel entries,
    ceil(S · T · k / (S + k + T)) − 1, k being kh + kw in its separable form. For Tucker-2 it is the
    largest common fraction of both ranks. It is found by a search, which works for any method whose
    cost grows with its rank.
    """

    def choose(self, candidate: Candidate) -> Choice:
        before = candidate.before
        rank = largest_rank(candidate, lambda cost: cost.amount < before.amount)
        if rank is None:
            least = candidate.cost(rank_at(candidate.max_rank, 0.0)).amount
            return Choice(
                reason=f"no rank saves {before.unit}: rank 1 needs {least:,}, "
                f"the layer {before.amount:,}"
            )
        return Choice(candidate, rank, note=by_parameters(candidate))


def by_parameters(candidate: Candidate) -> str | None:
    """The note of a row whose break-even rank compares parameters, as no MACs are known."""
    compared = candidate.before.macs or isinstance(candidate.before, LookupCost)
    return None if compared else "compared by parameters: no MACs observed"
