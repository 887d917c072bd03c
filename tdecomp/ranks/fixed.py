"""Ranks that the user names: a number, or a number or selector for each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tdecomp.layers.chain import Rank
from tdecomp.layers.cost import Cost
from tdecomp.model.filters import matches
from tdecomp.ranks.base import (
    NOTHING,
    Candidate,
    Choice,
    LocalSelector,
    RankSelector,
    as_tuple,
    is_positive_int,
    spread,
)


@dataclass(frozen=True)
class Fixed(LocalSelector):
    """This rank for every layer that it is not too large for.

    For Tucker-2 an int means the same rank twice; a pair is (R3, R4), in the order of the chain.
    For a tensor train of more than two cores an int is the most that each rank may be.
    """

    rank: Rank

    def __post_init__(self) -> None:
        ranks = as_tuple(self.rank)
        if not ranks or not all(map(is_positive_int, ranks)):
            raise ValueError(
                f"rank: expected a positive int, or a tuple of them for Tucker-2, got {self.rank!r}"
            )

    def for_candidate(self, candidate: Candidate) -> Rank:
        """The rank as the candidate's method takes it; a ValueError if it takes another number."""
        limit = candidate.max_rank
        rank = spread(self.rank, limit, candidate.decomposer)
        taken = f"layer {candidate.layer!r}: {candidate.method} takes"
        if isinstance(rank, tuple) and not isinstance(limit, tuple):
            raise ValueError(
                f"{taken} one rank, got {self.rank!r}; a dict of layer names (or globs) to ranks "
                "gives each its own"
            )
        if len(as_tuple(rank)) != len(as_tuple(limit)):
            raise ValueError(
                f"{taken} {len(as_tuple(limit))} ranks (or one int for all), got {self.rank!r}"
            )
        return rank

    def choose(self, candidate: Candidate) -> Choice:
        rank, limit = self.for_candidate(candidate), candidate.max_rank
        if exceeds(rank, limit):
            return Choice(reason=f"rank {rank} is above its largest useful one, {limit}")
        return Choice(candidate, rank)

    def select(self, sites: Sequence[Sequence[Candidate]], rest: Cost = NOTHING) -> list[Choice]:
        choices = super().select(sites, rest)
        if choices and all(choice.rank is None for choice in choices):
            limits = (candidates[0] for candidates in sites)
            shown = ", ".join(f"{c.layer!r} ({c.method}): {c.max_rank}" for c in limits)
            raise ValueError(
                f"rank {self.rank} is above the largest useful rank of every layer: expected at "
                f"most {shown}"
            )
        return choices


def exceeds(rank: Rank, max_rank: Rank) -> bool:
    """Whether any of the ranks is above its limit."""
    return any(r > limit for r, limit in zip(as_tuple(rank), as_tuple(max_rank), strict=True))


@dataclass(frozen=True)
class ByLayer(RankSelector):
    """A selector for each layer: exact names first, then globs and containers in their order.

    Layers that no entry names are left alone. A rank above the largest useful one of a layer
    named exactly is an error.
    """

    selectors: Mapping[str, RankSelector] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pattern, selector in self.selectors.items():
            if selector.weighs_layers:
                raise ValueError(
                    f"layer {pattern!r}: {selector} is for the whole model; expected a rank or a "
                    f"selector of one layer. Use rank={selector} by itself, with include= or "
                    "exclude= for the layers that it may change, and Plan.edit for single ones"
                )

    def select(self, sites: Sequence[Sequence[Candidate]], rest: Cost = NOTHING) -> list[Choice]:
        patterns = [self._pattern_of((c[0].layer, *c[0].aliases)) for c in sites]
        choices = [Choice(reason="no rank was given for it")] * len(sites)
        for pattern, selector in self.selectors.items():
            mine = [i for i, found in enumerate(patterns) if found == pattern]
            chosen = selector.select([sites[i] for i in mine], rest) if mine else []
            for i, choice in zip(mine, chosen, strict=True):
                choices[i] = choice
        return choices

    def wants_lookup(self, names: Sequence[str]) -> bool:
        if any(name in self.selectors for name in names):
            return True  # it is named itself
        selector = self.selector_of(names)
        return selector is None or selector.wants_lookup(names)

    def selector_of(self, names: Sequence[str]) -> RankSelector | None:
        """The selector for a layer of these names, or None."""
        pattern = self._pattern_of(names)
        return None if pattern is None else self.selectors[pattern]

    def _pattern_of(self, names: Sequence[str]) -> str | None:
        exact = next((name for name in names if name in self.selectors), None)
        globs = (p for p in self.selectors if any(matches(name, p) for name in names))
        return next(globs, None) if exact is None else exact
