"""A share of the full rank, of the parameters or of the MACs."""

from dataclasses import dataclass
from typing import Literal, get_args

from tdecomp.layers.cost import Cost
from tdecomp.ranks.base import Candidate, Choice, LocalSelector, check_share
from tdecomp.ranks.grid import largest_rank, rank_at

Of = Literal["rank", "params", "macs"]


@dataclass(frozen=True)
class Ratio(LocalSelector):
    """This share of each layer.

    >>> Ratio(0.5, of="macs")
    Ratio(ratio=0.5, of='macs')

    Parameters
    ----------
    ratio : float
        Above 0 and at most 1.
    of : {"rank", "params", "macs"}
        "rank": of the largest useful rank, rounded down, at least 1 (for Tucker-2 of both ranks).
        "params", "macs": the largest rank whose chain has at most that share of the layer's (for
        Tucker-2 a common fraction of both ranks, for split-svd the ranks that lose least together).

    Raises
    ------
    ValueError
        If the ratio is out of range or `of` is none of the three.
    """

    ratio: float
    of: Of

    def __post_init__(self) -> None:
        check_share("Ratio: expected a ratio", self.ratio)
        if self.of not in get_args(Of):
            known = ", ".join(map(repr, get_args(Of)))
            raise ValueError(f"Ratio: expected of to be one of {known}, got {self.of!r}")

    @property
    def saves(self) -> tuple[str, ...]:
        return ("params",) if self.of == "params" else ("macs",)

    def choose(self, candidate: Candidate) -> Choice:
        if self.of == "rank":
            return Choice(candidate, rank_at(candidate.max_rank, self.ratio))
        # A layer without observed MACs is measured by its parameters, and its row says so.
        by_macs = self.of == "macs" and bool(candidate.before.macs)
        unit = "MACs" if by_macs else "parameters"

        def amount(cost: Cost) -> int:
            return (cost.macs if by_macs else cost.params) or 0

        note = None if by_macs or self.of == "params" else "share of parameters: no MACs observed"
        limit = self.ratio * amount(candidate.before)
        rank = largest_rank(candidate, lambda cost: amount(cost) <= limit)
        if rank is None:
            least = amount(candidate.cost(rank_at(candidate.max_rank, 0.0)))
            return Choice(
                reason=f"no rank is small enough: rank 1 needs {least:,} {unit}, "
                f"{self.ratio} of the layer's {amount(candidate.before):,} is {limit:,.0f}"
            )
        return Choice(candidate, rank, note=note)
