"""The contract of a rank selector: what it sees of each layer, and what it answers.

A selector never sees a module. For each layer it gets one `Candidate` for every method that can
take the layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

from tdecomp.decomposers.base import Decomposer
from tdecomp.layers.chain import Rank
from tdecomp.layers.cost import Cost
from tdecomp.layers.spec import LayerSpec
from tdecomp.linalg.spectrum import Spectrum

NOTHING = Cost(0, 0)


@dataclass(frozen=True)
class Option:
    """A rank of a candidate, its cost and its loss."""

    rank: Rank
    cost: Cost
    loss: float  # in a unit that is the same for all layers
    error: float  # relative to this layer, see `Candidate.by_outputs`


class UnmetError(ValueError):
    """No choice of ranks is small enough in `unit`, "macs" or "params"; `least` share would do."""

    def __init__(self, message: str, unit: str, least: float) -> None:
        super().__init__(message)
        self.unit, self.least = unit, least


def _unknown(*_: Any) -> None:
    return None


def _unasked(_: Rank) -> bool:
    return True


@dataclass(frozen=True)
class Candidate:
    """A method that can take a layer; what is expensive is a callable, computed when called.

    >>> class Quarter(tdecomp.LocalSelector):
    ...     def choose(self, candidate):
    ...         return Choice(candidate, candidate.max_rank // 4)
    >>> tdecomp.plan(nn.Linear(64, 32), "svd", rank=Quarter(), progress=False)[""].rank
    8

    Attributes
    ----------
    layer, method : str
        The names of the layer and of the method.
    max_rank : int or tuple of int
        The largest useful rank, or ranks.
    before : Cost
        Of the layer itself: parameters, MACs (None without example inputs), seconds (`latency`).
    cost : callable ``(rank) -> Cost``
        Of the chain; it grows with each rank.
    spectra : callable ``() -> tuple of Spectrum``
        One spectrum for each rank; None for methods whose rank has none.
    options : callable ``() -> sequence of Option``
        The ranks worth considering, with their costs, losses and errors.
    aliases : tuple of str
        The layer's other names.
    rounded : bool
        Whether the options are multiples that the hardware runs efficiently, so that the ranks
        between them save no time.
    decomposer : Decomposer
        The method itself with its options.
    errors : callable ``() -> sequence of float``
        The exact errors at rank 0, 1, 2 … of a method whose best fits are nested, else None.
    error_at : callable ``(rank) -> float``
        Of a fit at this rank; None if it fails.
    best_ranks : callable ``() -> mapping of rank to float``
        For a method of several ranks those that lose least together, ascending, with their errors;
        None where only fits would tell.
    expected : callable ``(rank) -> float``
        The error to expect of this rank, exact or a bound; None where only a fit would tell.
    saves_work : callable ``(rank) -> bool``
        Whether the chain does less work for each input of a Linear layer, also where no example
        inputs are; of other layers it is not known, and True.
    by_outputs : bool
        Whether errors are shares of the variance of the layer's output on data, not
        ‖W − W̃‖ / ‖W‖.
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
    best_ranks: Callable[[], Mapping[Rank, float] | None] = _unknown
    expected: Callable[[Rank], float | None] = _unknown
    by_outputs: bool = False
    saves_work: Callable[[Rank], bool] = _unasked

    def would_lose(self, rank: Rank, error: float, *, bound: bool = False) -> str:
        """In words, what the layer's chain of this rank would lose; or at most, for a bound."""
        most = "at most " if bound else ""
        lost = f"have the relative error {most}{error:.3f}"
        if self.by_outputs:
            amount = f"{error:.1%}" if error >= 0.001 else "under 0.1%"
            lost = f"lose {most}{amount} of the output"
        return f"its best chain ({self.method} {rank}) would {lost}"


@dataclass(frozen=True)
class Choice:
    """A selector's answer for one layer: a method and a rank, or the reason for none.

    >>> Choice(reason="too narrow")
    Choice(candidate=None, rank=None, reason='too narrow', note=None, error=None, loss=0.0)

    Parameters
    ----------
    candidate : Candidate, optional
        The one that is chosen.
    rank : int or tuple of int, optional
        Of the form of `Candidate.max_rank`, at most that.
    reason : str, optional
        Why the layer is left alone.
    note : str, optional
        A remark for the layer's row.
    error, loss : float
        What is expected to be lost; only needed where the selector compares layers.
    """

    candidate: Candidate | None = None
    rank: Rank | None = None
    reason: str | None = None
    note: str | None = None
    error: float | None = None
    loss: float = 0.0


class RankSelector(ABC):
    """Chooses the ranks. Local selectors see one layer at a time, a budget sees all of them.

    >>> class OnlyTheLargest(RankSelector):
    ...     def select(self, sites, rest=None):
    ...         largest = sorted(sites, key=lambda site: site[0].before.params)[-1]
    ...         small = Choice(reason="not the largest layer")
    ...         return [Choice(s[0], 8) if s is largest else small for s in sites]
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    >>> [row.rank for row in tdecomp.plan(model, "svd", rank=OnlyTheLargest(), progress=False)]
    [8, None]
    """

    # Whether losses are compared between layers, which gradients make more accurate.
    weighs_layers: ClassVar[bool] = False
    # The share of the original's time that is asked for, and the multiple to round ranks to.
    latency: float | None = None
    round_to: int | None = None

    @property
    def saves(self) -> tuple[str, ...]:
        """What it is asked to save, of "macs", "params" and "latency".

        Lookups (an Embedding) have no MACs: they are offered to selectors that save parameters.
        """
        return ("macs",)

    def wants_lookup(self, names: Sequence[str]) -> bool:
        """Whether a lookup of these names is offered to it."""
        del names
        return "params" in self.saves

    @abstractmethod
    def select(self, sites: Sequence[Sequence[Candidate]], rest: Cost = NOTHING) -> list[Choice]:
        """One choice for each site, from its candidates in the order of the user's methods.

        `rest` is the cost of everything in the model outside these sites.
        """

    def least_loss(
        self, sites: Sequence[Sequence[Candidate]], rest: Cost = NOTHING
    ) -> float | None:
        """A lower bound on the summed losses of any choice; None where losses do not decide."""
        del sites, rest
        return None


def checked_choices(
    selector: RankSelector, sites: Sequence[Sequence[Candidate]], rest: Cost
) -> list[Choice]:
    """What a selector, the user's own included, chooses; an error if its answer cannot be used."""
    choices = selector.select(sites, rest)
    wanted = f"{type(selector).__name__}.select: expected a list of {len(sites)} Choice objects"
    listed = isinstance(choices, (list, tuple)) and all(isinstance(c, Choice) for c in choices)
    if not listed or len(choices) != len(sites):
        raise TypeError(f"{wanted}, one for each layer, got {choices!r}")
    for (first, *_), choice in zip(sites, choices, strict=True):
        candidate, rank = choice.candidate, choice.rank
        if candidate is None or rank is None:
            continue
        ranks, limits = as_tuple(rank), as_tuple(candidate.max_rank)
        alike = isinstance(rank, tuple) == isinstance(candidate.max_rank, tuple)
        whole = alike and len(ranks) == len(limits) and all(map(is_positive_int, ranks))
        if not whole or any(r > most for r, most in zip(ranks, limits, strict=True)):
            raise ValueError(
                f"layer {first.layer!r}: {type(selector).__name__} chose rank {rank!r} of "
                f"{candidate.method}; expected at least 1 and at most {candidate.max_rank}"
            )
    return list(choices)


class LocalSelector(RankSelector):
    """A selector that decides for each layer alone, with the first method that can take it.

    >>> class Narrow(LocalSelector):
    ...     def choose(self, candidate):
    ...         return Choice(candidate, 1)
    >>> tdecomp.plan(nn.Linear(64, 32), "svd", rank=Narrow(), progress=False)[""].rank
    1
    """

    @abstractmethod
    def choose(self, candidate: Candidate) -> Choice:
        """The rank for this candidate, or the reason for none."""

    def select(self, sites: Sequence[Sequence[Candidate]], rest: Cost = NOTHING) -> list[Choice]:
        del rest  # it only matters to selectors that compare layers
        return [self.choose(candidates[0]) for candidates in sites]


def check_share(expected: str, value: object, allowed: str = "above 0 and at most 1") -> None:
    """Refuse what is no number above 0 and at most 1."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < float(value) <= 1:
        raise ValueError(f"{expected} {allowed}, got {value!r}")


def is_positive_int(value: object) -> bool:
    """Whether this is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def as_tuple(rank: Rank) -> tuple[int, ...]:
    """The ranks as a tuple, a single one included."""
    return rank if isinstance(rank, tuple) else (rank,)


def in_form_of(max_rank: Rank, ranks: Iterable[int]) -> Rank:
    """The ranks as the method takes them: an int where its largest rank is one, else a tuple."""
    found = tuple(ranks)
    return found if isinstance(max_rank, tuple) else found[0]


def spread(rank: Rank, max_rank: Rank, method: Decomposer | None = None) -> Rank:
    """An int for each rank of a method of several ranks; others as they are.

    Where it caps them, ranks whose largest is below are that; one above all of them stays.
    """
    if not (isinstance(rank, int) and isinstance(max_rank, tuple)):
        return rank
    if method is not None and method.int_rank_caps and rank <= max(max_rank):
        return tuple(min(rank, most) for most in max_rank)
    return (rank,) * len(max_rank)


def checked_rank(where: str, method: Decomposer, spec: LayerSpec, rank: Any) -> Rank:
    """The rank as the method takes it; a ValueError where it cannot take the layer, or the rank."""
    refusal = method.refuses(spec)
    if refusal is not None:
        raise ValueError(f"{where} ({spec}): {refusal}")
    given = tuple(rank) if isinstance(rank, list) else rank
    chosen = spread(given, method.max_rank(spec), method)
    try:
        method.check_rank(chosen, spec)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return chosen


def spectra_of(candidate: Candidate, selector: str) -> tuple[Spectrum, ...]:
    """One spectrum for each rank; a ValueError if the method's rank has none, as with CP."""
    spectra = candidate.spectra()
    if spectra is None:
        raise ValueError(
            f"layer {candidate.layer!r}: {selector} reads singular values, which say nothing of "
            f"the rank of {candidate.method!r}. Selectors that apply to it: an int, a float or "
            "Ratio(..., of='rank'), Ratio(..., of='params'), Ratio(..., of='macs'), 'breakeven'"
        )
    return spectra
