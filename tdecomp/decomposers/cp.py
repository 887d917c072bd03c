"""CP: a sum of separable kernels, run as pointwise, depthwise and pointwise layers.

Lebedev et al. 2015, "Speeding-up Convolutional Neural Networks Using Fine-tuned
CP-Decomposition", equations 4 to 8; the joint form keeps the spatial modes together.
"""

import math
from dataclasses import dataclass, replace

import tensorly
import torch
from torch import Tensor

from tdecomp.decomposers.als import ALS, EFFORTS, component_norms
from tdecomp.decomposers.base import DRAFT_ITERATIONS, Iterative
from tdecomp.decomposers.factors import Factors
from tdecomp.layers.chain import Rank
from tdecomp.layers.spec import LayerSpec
from tdecomp.linalg.features import ProductFeatures
from tdecomp.linalg.least_squares import SeparableFit
from tdecomp.linalg.second_moment import SecondMoment
from tdecomp.linalg.tensorly_backend import torch_backend

# An iteration of L-BFGS gains less than a sweep, so that a fit to data waits longer.
_FINER = 1e-4


@dataclass(frozen=True)
class CPFactors(Factors):
    """A kernel as a sum over r of outer products of the factors' columns."""

    # (out, R), (in, R), then one (k, R) per spatial mode, or a single one for all of them.
    factors: tuple[Tensor, ...]
    kernel_size: tuple[int, ...]

    def to_kernel(self) -> Tensor:
        with torch_backend():
            kernel: Tensor = tensorly.cp_to_tensor((None, list(self.factors)))
        return kernel.reshape(*kernel.shape[:2], *self.kernel_size)

    def stage_weights(self) -> tuple[Tensor, ...]:
        out, into, *spatial = self.factors
        ones = [1] * len(self.kernel_size)
        depthwise = []
        for d, factor in enumerate(spatial):
            along = (*ones[:d], len(factor), *ones[d + 1 :])
            shape = self.kernel_size if len(spatial) == 1 else along
            depthwise.append(factor.T.reshape(-1, 1, *shape))  # (R, 1, *kernel)
        first = into.T.reshape(*into.T.shape, *ones)  # (R, in, 1, 1)
        return first, *depthwise, out.reshape(*out.shape, *ones)  # the last one is (out, R, 1, 1)

    def scaled(self, scale: float) -> "CPFactors":
        share = scale ** (1 / len(self.factors))
        return replace(self, factors=tuple(factor * share for factor in self.factors))

    def squared_norm(self) -> Tensor:
        # Kolda and Bader 2009, "Tensor Decompositions and Applications", section 3.4.
        grams = torch.stack([factor.T @ factor for factor in self.factors])  # (modes, R, R)
        return grams.prod(dim=0).sum()

    def component_norms(self) -> float:
        return component_norms(self.factors)

    def balanced(self) -> "CPFactors":
        """The same kernel, each component's norm shared equally among its factors.

        ALS leaves nearly all of it in one, which makes the gradients of the others large.
        """
        norms = torch.stack([factor.norm(dim=0) for factor in self.factors])  # (modes, R)
        share = norms.log().mean(dim=0).exp()
        # A component with a zero factor is zero: all of its factors become so.
        gains = torch.where(norms > 0, share / norms, torch.zeros_like(norms))
        return replace(self, factors=tuple(f * g for f, g in zip(self.factors, gains, strict=True)))


@dataclass(frozen=True)
class CP(Iterative):
    """Conv S→T becomes pointwise S→R, one K×K depthwise, and pointwise R→T with the bias.

    >>> CP(random_state=1).max_rank(LayerSpec(16, 32, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0)))
    144

    Lebedev et al. 2015, "Speeding-up Convolutional Neural Networks Using Fine-tuned
    CP-Decomposition", equations 4 to 8, with the spatial modes kept together.

    Parameters
    ----------
    n_iter_max : int
        Sweeps of alternating least squares at most.
    tol : float
        Stops when the relative reconstruction error changes by less from one sweep to the next.
    l2_reg : float
        Ridge on the factors, for a kernel of norm 1; with 0 a fit that degenerates is refused.
    random_state : int
        For the columns that a start lacks where the rank is above a mode's size.
    effort : {"balanced", "quick"}
        "quick" stops at twenty times `tol` and polishes less: two or three times as fast, at an
        error up to some hundredths larger.

    Raises
    ------
    ValueError
        If `n_iter_max` is below 1, `tol` or `l2_reg` below 0, or `effort` is none of the two.
    """

    name = "cp"
    source = "Lebedev et al. 2015, joint spatial modes"
    fits_in_float64 = True
    starts_from_weights = True
    _joint = True  # one depthwise layer, and one factor, for all spatial modes together

    n_iter_max: int = 100
    tol: float = 1e-4
    l2_reg: float = 1e-4
    random_state: int = 0
    effort: str = "balanced"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.effort not in tuple(EFFORTS):  # a tuple, as the effort need not be hashable
            known = " or ".join(map(repr, EFFORTS))
            raise ValueError(f"{self.name}: expected effort to be {known}, got {self.effort!r}")
        if not self.l2_reg >= 0:
            raise ValueError(f"{self.name}: expected l2_reg of 0 or more, got {self.l2_reg!r}")

    def refusal(self, spec: LayerSpec) -> str | None:
        return None if spec.ndim else f"{self.name} takes convolutions; svd takes Linear layers"

    def max_rank(self, spec: LayerSpec) -> int:
        modes = self._modes(spec.group_out, spec.group_in, *spec.kernel_size)
        return math.prod(modes) // max(modes)

    def stages(self, spec: LayerSpec, rank: Rank) -> tuple[LayerSpec, ...]:
        assert isinstance(rank, int)
        middle = rank * spec.groups
        first = spec.pointwise(spec.in_channels, middle)
        depthwise = [spec.like(in_channels=middle, out_channels=middle, bias=False)]
        if not self._joint:
            depthwise = [spec.along([d], middle, middle) for d in range(spec.ndim)]
        last = spec.pointwise(middle, spec.out_channels, bias=spec.bias)
        return first, *(stage.like(groups=middle) for stage in depthwise), last

    def fit(
        self, kernel: Tensor, rank: Rank, start: Factors | None = None, *, draft: bool = False
    ) -> CPFactors:
        assert isinstance(rank, int)
        begin = start.factors if isinstance(start, CPFactors) else None
        factors = self._als(draft).fit(kernel.reshape(self._modes(*kernel.shape)), rank, begin)
        return CPFactors(tuple(factors), tuple(kernel.shape[2:])).balanced()

    def fitted(
        self,
        kernel: Tensor,
        rank: Rank,
        moment: SecondMoment,
        start: CPFactors | None,
        *,
        draft: bool,
    ) -> CPFactors:
        # The factor of the outputs follows from the others. Kalle et al. 2025, "Distribution-Aware
        # Tensor Decomposition for Compression of Convolutional Neural Networks", fit in this norm
        # by alternating least squares.
        begin = self._first(kernel, rank, draft=draft) if start is None else start
        fit, tol = SeparableFit(kernel.flatten(1), moment, ProductFeatures()), self.tol * _FINER
        out, theta = fit.minimise(
            begin.factors[1:], n_iter_max=self.n_iter_max, tol=tol, draft=draft
        )
        tiny = torch.finfo(out.dtype).tiny
        unit = [factor / factor.norm(dim=0).clamp_min(tiny) for factor in theta]
        return replace(begin, factors=(out, *unit)).balanced()

    def _first(self, kernel: Tensor, rank: Rank, *, draft: bool) -> CPFactors:
        """What a fit to data starts from by default."""
        if not draft or not kernel.any():
            return self.fit(kernel, rank)
        assert isinstance(rank, int)
        factors = self._als(draft).few_sweeps(kernel.reshape(self._modes(*kernel.shape)), rank)
        return CPFactors(tuple(factors), tuple(kernel.shape[2:]))

    def contained_in(self, spec: LayerSpec) -> tuple[str, ...]:
        return ("svd", "lowrank", "spatial") if spec.kernel_volume == 1 else ()

    def exact_at_parity(self, spec: LayerSpec) -> bool:
        # Generic tensors of three and more modes are of about that rank. Without the ridge a fit
        # may be refused there, which only trying tells.
        return spec.kernel_volume > 1 and self.l2_reg > 0

    def factors_of(self, stage_weights: tuple[Tensor, ...]) -> CPFactors:
        first, *depthwise, last = stage_weights
        sizes = [stage.shape[2:] for stage in depthwise]
        kernel_size = tuple(max(along) for along in zip(*sizes, strict=True))
        spatial = (stage.flatten(1).T for stage in depthwise)
        return CPFactors((last.flatten(1), first.flatten(1).T, *spatial), kernel_size)

    def _modes(self, out: int, into: int, *kernel_size: int) -> tuple[int, ...]:
        """The shape of the tensor that CP is of."""
        return out, into, *([math.prod(kernel_size)] if self._joint else kernel_size)

    def _als(self, draft: bool) -> ALS:
        most = self.limited(DRAFT_ITERATIONS) if draft else self
        return ALS(most.n_iter_max, self.tol, self.l2_reg, self.random_state, self.effort, draft)


@dataclass(frozen=True)
class CPSeparable(CP):
    """As `CP`, with the depthwise step split into one layer per spatial dimension (four in 2-d).

    >>> spec = LayerSpec.of(nn.Conv2d(16, 32, 3))
    >>> [stage.kernel_size for stage in CPSeparable().stages(spec, 8)]
    [(1, 1), (3, 1), (1, 3), (1, 1)]

    The form of Lebedev et al. 2015, equations 4 to 8. Its parameters are those of `CP`.
    """

    name = "cp-separable"
    source = "Lebedev et al. 2015"
    _joint = False

    def contained_in(self, spec: LayerSpec) -> tuple[str, ...]:
        return (*super().contained_in(spec), CP.name)
