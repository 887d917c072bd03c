"""What a rank selector sees and answers, and the walk along a method's ranks that they share.

A selector never sees a module: for each layer it gets the methods that can take it, and for each
of them the range of ranks, the cost of a rank and, when asked for, the spectra.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import Any, ClassVar

from tdecomp.layers.chain import Rank
from tdecomp.layers.cost import Cost
from tdecomp.linalg.spectrum import Spectrum

NOTHING = Cost(0, 0)
# Of a layer's cost, that a chain may keep to be worth considering.
LARGEST_SHARE = 0.9


@dataclass(frozen=True)
class Option:
    """A rank of a candidate, with what it costs and what it loses.

    Attributes
    ----------
    rank : int or tuple of int
    cost : Cost
    loss : float
        Comparable from layer to layer.
    error : float
        The layer's own: the share of its output's variance that is lost, or without data
        ``‖W − W̃‖ / ‖W‖``.
    """

    rank: Rank
    cost: Cost
    loss: float
    error: float


def _unknown(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Candidate:
    """A method that can take a layer.

    Attributes
    ----------
    layer : str
        The layer's name, for messages.
    method : str
    max_rank : int or tuple of int
        The largest useful rank, or ranks.
    before : Cost
        Of the layer as it is.
    cost : callable ``rank -> Cost``
        Of the chain, growing with each rank.
    spectra : callable ``() -> tuple of Spectrum or None``
        One for each rank, computed when called; None for methods whose rank has no spectrum.
    options : callable ``() -> sequence of Option``
        The ranks worth considering, computed when called.
    aliases : tuple of str
        The layer's other names.
    rounded : bool
        Whether the options are multiples that the hardware likes, between which there is nothing
        to be gained.
    """

    layer: str
    method: str
    max_rank: Rank
    before: Cost
    cost: Callable[[Rank], Cost]
    spectra: Callable[[], tuple[Spectrum, ...] | None]
    options: Callable[[], Sequence[Option]] = tuple
    aliases: tuple[str, ...] = ()
    rounded: bool = False
    decomposer: Any = None
    errors: Callable[[], Sequence[float] | None] = _unknown
    error_at: Callable[[Rank], float | None] = _unknown
    by_outputs: bool = False


@dataclass(frozen=True)
class Choice:
    """What a selector answers for one layer: a method and a rank, or the reason for none."""

    candidate: Candidate | None = None
    rank: Rank | None = None
    reason: str | None = None
    note: str | None = None
    error: float | None = None
    loss: float = 0.0


class RankSelector(ABC):
    """Decides how much. Local selectors look at one layer; a budget looks at all of them."""

    # Whether it weighs layers against each other, so that gradients are worth their time.
    weighs_layers: ClassVar[bool] = False

    # The share of the original's time that is asked for, and the multiple that ranks shall have.
    latency: float | None = None
    round_to: int | None = None

    @property
    def largest_share(self) -> float:
        """Of a layer's own cost, that its chain may keep to be worth an iterative fit."""
        return LARGEST_SHARE

    @abstractmethod
    def select(self, sites: Sequence[Sequence[Candidate]], rest: Cost = NOTHING) -> list[Choice]:
        """One choice per site, from its candidates in the order of the user's methods.

        `rest` is the cost of all of the model that is none of these sites.
        """


class LocalSelector(RankSelector):
    """A selector that decides for each layer alone, with the first method that can take it."""

    @abstractmethod
    def choose(self, candidate: Candidate) -> Choice:
        """The rank for this candidate, or the reason for none."""

    def select(self, sites: Sequence[Sequence[Candidate]], rest: Cost = NOTHING) -> list[Choice]:
        del rest  # each layer for itself
        return [self.choose(candidates[0]) for candidates in sites]


def is_share(value: object) -> bool:
    """Whether this is a number above 0 and at most 1."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) <= 1


def rank_at(max_rank: Rank, fraction: float | Fraction) -> Rank:
    """That fraction of the largest useful rank, floored, at least 1; of each rank of a tuple.

    >>> rank_at(100, 0.25), rank_at((64, 128), 0.1)
    (25, (6, 12))
    """
    if isinstance(max_rank, tuple):
        return tuple(max(1, int(fraction * limit)) for limit in max_rank)
    return max(1, int(fraction * max_rank))


def spread(rank: Rank, max_rank: Rank) -> Rank:
    """One int for a method of several ranks means each of them; all else stays as it is.

    >>> spread(8, (64, 128)), spread(8, 64)
    ((8, 8), 8)
    """
    if isinstance(rank, int) and isinstance(max_rank, tuple):
        return (rank,) * len(max_rank)
    return rank


def rank_ladder(max_rank: Rank) -> Sequence[Rank]:
    """Every rank that a common fraction of the largest ones gives, ascending.

    >>> rank_ladder((2, 4))
    [(1, 1), (1, 2), (1, 3), (2, 4)]
    """
    if isinstance(max_rank, int):
        return range(1, max_rank + 1)
    fractions = {Fraction(r, limit) for limit in max_rank for r in range(1, limit + 1)}
    return sorted({rank_at(max_rank, fraction) for fraction in fractions})


def largest_rank(candidate: Candidate, fits: Callable[[Cost], bool]) -> Rank | None:
    """The largest rank of the ladder whose cost `fits`, or None; costs grow along the ladder."""
    ladder = rank_ladder(candidate.max_rank)
    low, high = 0, len(ladder)  # every rank below `low` fits, none from `high` on
    while low < high:
        middle = (low + high) // 2
        if fits(candidate.cost(ladder[middle])):
            low = middle + 1
        else:
            high = middle
    return ladder[low - 1] if low else None
