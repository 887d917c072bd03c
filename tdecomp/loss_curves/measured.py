"""What ranks lose, as it is kept."""

from dataclasses import dataclass

from tdecomp.layers.chain import Rank
from tdecomp.linalg.best_ranks import BestRanks
from tdecomp.ranks.base import as_tuple

# The loss weighted by gradients (None where they are not known), and the layer's own share of its
# output's variance or of its squared weights.
Measured = tuple[float | None, float]
Lost = tuple[float, float]  # the loss, comparable from layer to layer, and the same share


@dataclass(frozen=True)
class KnownRanks:
    """The ranks that lose least together, with losses that need no fit."""

    best: BestRanks
    variance: float  # of the output, or the sum of the squared weights

    def share(self, rank: Rank) -> float:
        """The lost share of any ranks."""
        return self.best.lost(as_tuple(rank)) / self.variance

    @property
    def measured(self) -> dict[Rank, Measured]:
        """By each of the ranks, ascending, what it loses."""
        ranks, weighted = self.best.ranks, self.best.weighted
        losses = [None] * len(ranks) if weighted is None else weighted.tolist()
        return {r: (loss, self.share(r)) for r, loss in zip(ranks, losses, strict=True)}
