# ruff: noqa: ARG002  the defaults of the contract use no arguments
"""The contract of a decomposer, and what the methods that iterate have in common.

A method's file holds its factors, a frozen dataclass, and below them the class that says which
layers it takes, which chain it makes and how it fits one dense kernel (out, in, *kernel). Groups,
layouts, dtypes and scales are handled once, in `fit_layer` and `assemble`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from tdecomp.decomposers.factors import Factorization, Factors, better
from tdecomp.layers.chain import Chain, Rank
from tdecomp.layers.spec import LayerSpec
from tdecomp.layers.stage import Stage
from tdecomp.linalg.best_ranks import BestRanks
from tdecomp.linalg.second_moment import SecondMoment, is_wide

# A draft is only compared with other drafts: a few iterations are enough.
DRAFT_ITERATIONS = 8


class Decomposer(ABC):
    """One method: which layers it takes, its ranks, its chain and how to fit it.

    >>> method, spec = tdecomp.LowRank(), LayerSpec.of(nn.Conv2d(16, 32, 3))
    >>> method.max_rank(spec), method.refusal(LayerSpec.of(nn.Linear(4, 4)))
    (32, 'lowrank takes convolutions; svd takes Linear layers')

    A subclass is usually a frozen dataclass whose fields are the options of the fit. It has a
    `name`, a `source` (the paper), and defines the four abstract methods; where each rank belongs
    to the spectrum of an unfolding of the kernel, `unfoldings` too.

    Attributes
    ----------
    fits_in_float64 : bool
        Whether fits run in float64. Normal equations square a condition number, so methods that
        solve them need it.
    fits_large_in_float32 : bool
        Whether `fit_to`, `lost_at_every_rank` and `best_ranks` take the kernels of large layers in
        float32, and compute in float64 only what needs it, a part at a time: a copy would take most
        of the memory of a fit. The kernel that its factors make shares no memory with them: it is
        overwritten by its error.
    iterative : bool
        Whether the fit iterates. Only such a method is ever asked for a draft.
    takes_lookups : bool
        Whether it takes lookups (an Embedding), too: its first stage has to be one then.
    int_rank_caps : bool
        Whether an int given to a method of several ranks is the most that each of them may be; else
        each rank is that int, and it must not be above any of the largest ones.
    last_mixes_outputs : bool
        Whether the last stage's weight, multiplied by a matrix, gives the kernel multiplied by it,
        as where that stage is a layer. Else `refit` counts errors of all outputs alike.
    drafts_cost_less : bool
        Whether a few drafts take less time than `lost_at_every_rank`, so that they tell which ranks
        are worth considering.
    draft_products : int
        Products of a kernel's size with a moment that the drafts of a plan take together, about.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    fits_in_float64: ClassVar[bool] = False
    fits_large_in_float32: ClassVar[bool] = False
    iterative: ClassVar[bool] = False
    takes_lookups: ClassVar[bool] = False
    int_rank_caps: ClassVar[bool] = False
    last_mixes_outputs: ClassVar[bool] = True
    drafts_cost_less: ClassVar[bool] = False
    draft_products: ClassVar[int] = 60

    def refuses(self, spec: LayerSpec) -> str | None:
        """`refusal`, which methods that take no lookups need not know of."""
        if spec.lookup and not self.takes_lookups:
            return f"{self.name} takes no lookups; svd does"
        return self.refusal(spec)

    @abstractmethod
    def refusal(self, spec: LayerSpec) -> str | None:
        """Why this method cannot take such a layer; None if it can."""

    @abstractmethod
    def max_rank(self, spec: LayerSpec) -> Rank:
        """The largest useful rank: per group, and a tuple for methods of several ranks."""

    @abstractmethod
    def stages(self, spec: LayerSpec, rank: Rank) -> tuple[Stage, ...]:
        """The layers of the chain, first to last; the last one has the bias.

        Usually each is a `LayerSpec`, which builds a stock layer. A method whose chain has a
        module of its own returns its own `Stage`.
        """

    @abstractmethod
    def fit(
        self, kernel: Tensor, rank: Rank, start: Factors | None = None, *, draft: bool = False
    ) -> Factors:
        """Fit the factors to one group's kernel (out, in, *kernel), scaled to at most 1.

        Only methods that iterate are given the last two arguments. `start` holds factors of this
        rank to begin with. A draft is only compared with other drafts: a few iterations are enough.
        """

    def fit_to(
        self,
        kernel: Tensor,
        rank: Rank,
        moment: SecondMoment,
        start: Factors | None = None,
        *,
        draft: bool = False,
    ) -> Factors | None:
        """Fit one group's kernel in the norm of its inputs; None for methods that cannot.

        The kernel is float64, but for large ones of methods with `fits_large_in_float32`; the
        moment may be held in float32. `start` holds factors of this rank to improve on, such as a
        chain's own; by default those that `fit` finds. Except for a draft, the result is never
        worse than the start.
        """
        return None

    def lost_at_every_rank(
        self, kernel: Tensor, moment: SecondMoment | None, importance: Tensor | None = None
    ) -> Tensor | None:
        """The losses of the best fits of rank 0, 1, 2 … where the fits are nested, or else None.

        ``tr(H D G Dᵀ)`` of the difference D, with G the moment and H the importance (out, out) of
        the outputs; a missing one counts as the identity.
        """
        return None

    def plain_and_weighted_losses(
        self, kernel: Tensor, moment: SecondMoment | None, importance: Tensor | None
    ) -> tuple[Tensor, Tensor | None] | None:
        """`lost_at_every_rank` without an importance, and with it (None without).

        Methods that find both at once override it, too.
        """
        plain = self.lost_at_every_rank(kernel, moment)
        if plain is None or importance is None:
            return None if plain is None else (plain, None)
        weighted = self.lost_at_every_rank(kernel, moment, importance)
        return None if weighted is None else (plain, weighted)

    def best_ranks(
        self,
        kernel: Tensor,
        moment: SecondMoment | None,
        importance: Tensor | None,
        steps: Sequence[int],
    ) -> BestRanks | None:
        """The ranks that lose least together, where several ranks' losses need no fit; else None.

        In the norms of `lost_at_every_rank`; each rank is a multiple of its entry of `steps`. Only
        asked of layers without groups.
        """
        return None

    def for_layer(self, spec: LayerSpec) -> "Decomposer":
        """The method for the kernels of this layer, where its spec says more of them than shapes.

        Its `fit`, `fit_to`, `unfoldings`, `lost_at_every_rank` and `best_ranks` are called.
        """
        return self

    def output_blocks(self, spec: LayerSpec) -> tuple[int, ...]:
        """The sizes of runs of a group's outputs that no factor mixes with each other.

        Refitting multiplies the outputs by matrices, which have to leave the factors their form.
        """
        return (spec.group_out,)

    def contained_in(self, spec: LayerSpec) -> tuple[str, ...]:
        """The methods that include this one on such a layer: they lose no more at the same rank.

        No two methods may name each other.
        """
        return ()

    def exact_at_parity(self, spec: LayerSpec) -> bool:
        """Whether almost nothing is lost once the chain has as many weights as the layer."""
        return False

    def limited(self, iterations: int) -> "Decomposer":
        """The same method with at most this many iterations, for fits that start near their end."""
        return self

    def factors_of(self, stage_weights: tuple[Any, ...]) -> Factors | None:
        """The factors that have these `stage_weights`, or None for methods that cannot tell."""
        return None

    def unfoldings(self, kernel: Tensor) -> tuple[Tensor, ...] | None:
        """One matrix per rank, whose singular values say how much the rank keeps; or None."""
        return None

    def check_rank(self, rank: Rank, spec: LayerSpec) -> None:
        """Raise a ValueError unless `rank` is one that this method can use on this layer."""
        largest = self.max_rank(spec)
        ranks = rank if isinstance(rank, tuple) else (rank,)
        limits = largest if isinstance(largest, tuple) else (largest,)
        if len(ranks) != len(limits) or isinstance(rank, tuple) != isinstance(largest, tuple):
            wanted = "one rank" if isinstance(largest, int) else f"{len(limits)} ranks"
            raise ValueError(f"{self.name} takes {wanted}, got {rank!r}")
        if any(isinstance(r, bool) or not isinstance(r, int) for r in ranks):
            raise ValueError(f"{self.name} takes whole ranks, got {rank!r}")
        if any(not 1 <= r <= limit for r, limit in zip(ranks, limits, strict=True)):
            raise ValueError(
                f"rank {rank} is not in the range of {self.name} on {spec}: expected at least 1 "
                f"and at most {largest}, its largest useful rank"
            )

    def factors_in(self, chain: Chain) -> Factorization | None:
        """The factors in float64 that a chain of this method holds, or None if it cannot tell."""
        spec, rank = chain.replaced, chain.rank
        assert spec is not None
        assert rank is not None
        stages = zip(self.stages(spec, rank), chain, strict=True)
        per_stage = [_by_group(stage.read(part), spec.groups) for stage, part in stages]
        groups = [self.factors_of(parts) for parts in zip(*per_stage, strict=True)]
        known = tuple(factors for factors in groups if factors is not None)
        return Factorization(spec, known) if len(known) == spec.groups else None

    @property
    def uses_moments(self) -> bool:
        """Whether `fit_to` is defined."""
        return type(self).fit_to is not Decomposer.fit_to

    @property
    def knows_losses(self) -> bool:
        """Whether `lost_at_every_rank` is defined."""
        return type(self).lost_at_every_rank is not Decomposer.lost_at_every_rank

    @property
    def knows_best_ranks(self) -> bool:
        """Whether `best_ranks` is defined."""
        return type(self).best_ranks is not Decomposer.best_ranks


def _by_group(values: Any, groups: int) -> Sequence[Any]:
    """A stage's values for each group; those of a module of a method's own may be a tuple."""
    found: Sequence[Any] = (values,) if groups == 1 else values.chunk(groups)
    return found


@dataclass(frozen=True)
class Iterative(Decomposer):
    """A method whose fits to data start from factors and improve on them."""

    iterative = True
    draft_iterations: ClassVar[int] = DRAFT_ITERATIONS  # of a draft that is fitted to data
    # Whether a fit to data starts from one to the weights; else narrow layers are given the better.
    starts_from_weights: ClassVar[bool] = False

    n_iter_max: int
    tol: float

    def __post_init__(self) -> None:
        most, tol = self.n_iter_max, self.tol
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ValueError(f"{self.name}: expected n_iter_max of at least 1, got {most!r}")
        if not isinstance(tol, (int, float)) or not tol >= 0:
            raise ValueError(f"{self.name}: expected tol of 0 or more, got {tol!r}")

    @abstractmethod
    def fitted(
        self, kernel: Tensor, rank: Rank, moment: SecondMoment, start: Any, *, draft: bool
    ) -> Factors:
        """Factors in the norm of a moment; from this method's factors `start`, or from its own."""

    def fit_to(
        self,
        kernel: Tensor,
        rank: Rank,
        moment: SecondMoment,
        start: Factors | None = None,
        *,
        draft: bool = False,
    ) -> Factors:
        method = self.limited(self.draft_iterations) if draft else self
        fitted = method.fitted(kernel, rank, moment, start, draft=draft)
        if draft or (start is None and (self.starts_from_weights or is_wide(moment.fan_in))):
            return fitted
        other = self.fit(kernel, rank) if start is None else start
        return better(kernel, moment, fitted, other.balanced())

    def limited(self, iterations: int) -> Self:
        return replace(self, n_iter_max=min(self.n_iter_max, iterations))
