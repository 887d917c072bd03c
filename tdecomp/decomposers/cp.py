"""CP: a sum of separable kernels, run as pointwise, depthwise and pointwise layers.

Lebedev et al. 2015, "Speeding-up Convolutional Neural Networks Using Fine-tuned
CP-Decomposition", equations 4 to 8; the joint form keeps the spatial modes together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import tensorly
import torch
from torch import Tensor

from tdecomp.decomposers.als import EFFORTS, ALSOptions, component_norms, cp_factors, few_sweeps
from tdecomp.decomposers.base import DRAFT_ITERATIONS, Decomposer, check_iteration
from tdecomp.decomposers.factors import Factors, better
from tdecomp.layers.chain import Rank
from tdecomp.layers.spec import LayerSpec
from tdecomp.linalg.least_squares import Features, SeparableFit
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
        depthwise = [
            factor.T.reshape(-1, 1, *shape)  # (R, 1, *kernel)
            for factor, shape in zip(spatial, self._spatial_shapes(), strict=True)
        ]
        first = into.T.reshape(*into.T.shape, *ones)  # (R, in, 1, 1)
        return first, *depthwise, out.reshape(*out.shape, *ones)  # the last one is (out, R, 1, 1)

    def scaled(self, scale: float) -> "CPFactors":
        share = scale ** (1 / len(self.factors))
        return replace(self, factors=tuple(factor * share for factor in self.factors))

    def component_norms(self) -> float:
        return component_norms(self.factors)

    def balanced(self) -> "CPFactors":
        """The same kernel, each component's norm shared equally among its factors.

        ALS leaves nearly all of the norm in one factor, which makes the gradients of the others
        large when the chain is trained.
        """
        norms = torch.stack([factor.norm(dim=0) for factor in self.factors])  # (modes, R)
        share = norms.log().mean(dim=0).exp()
        # A component with a zero factor is zero: all of its factors become so.
        gains = torch.where(norms > 0, share / norms, torch.zeros_like(norms))
        return replace(self, factors=tuple(f * g for f, g in zip(self.factors, gains, strict=True)))

    def _spatial_shapes(self) -> list[tuple[int, ...]]:
        if len(self.factors) == 3:
            return [self.kernel_size]
        size, ndim = self.kernel_size, len(self.kernel_size)
        return [tuple(size[d] if d == mode else 1 for d in range(ndim)) for mode in range(ndim)]


def fit_cp_to(
    kernel: Tensor, start: CPFactors, moment: SecondMoment, n_iter_max: int, tol: float
) -> CPFactors:
    """The same form in the norm of a moment: the factor of the outputs follows from the others.

    Kalle et al. 2025, "Distribution-Aware Tensor Decomposition for Compression of Convolutional
    Neural Networks", fit in this norm by alternating least squares.
    """
    fit = SeparableFit(kernel.flatten(1), moment, cp_features())
    out, theta = fit.minimise(start.factors[1:], n_iter_max=n_iter_max, tol=tol)
    unit = [factor / factor.norm(dim=0).clamp_min(torch.finfo(out.dtype).tiny) for factor in theta]
    return replace(start, factors=(out, *unit)).balanced()


def cp_features() -> Features:
    """The columns that the factor of the outputs multiplies, as a function of all other factors."""
    return Features(
        lambda matrix, theta: matrix @ _khatri_rao(theta),
        lambda weights, theta: (weights * _khatri_rao(theta)).sum(),
    )


def _khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Columns (fan_in, R) of unit norm, the last mode changing fastest as in the kernel."""
    product = factors[0].new_ones(1, factors[0].shape[1])
    for factor in factors:
        norms = factor.norm(dim=0)
        unit = factor / torch.where(norms > 0, norms, 1.0)
        product = (product[:, None] * unit[None]).flatten(0, 1)
    return product


@dataclass(frozen=True)
class CP(Decomposer):
    """Conv S→T becomes pointwise S→R, one K×K depthwise, and pointwise R→T with the bias.

    >>> CP(random_state=1).max_rank(LayerSpec(16, 32, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0)))
    144

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
    """

    name: ClassVar[str] = "cp"
    source: ClassVar[str] = "Lebedev et al. 2015, joint spatial modes"
    fits_in_float64: ClassVar[bool] = True
    iterative: ClassVar[bool] = True

    n_iter_max: int = 100
    tol: float = 1e-4
    l2_reg: float = 1e-4
    random_state: int = 0
    effort: str = "balanced"

    def __post_init__(self) -> None:
        check_iteration(self.name, self.n_iter_max, self.tol)
        if self.effort not in tuple(EFFORTS):  # a tuple, as the effort need not be hashable
            known = " or ".join(map(repr, EFFORTS))
            raise ValueError(f"{self.name}: expected effort to be {known}, got {self.effort!r}")
        if not self.l2_reg >= 0:
            raise ValueError(f"{self.name}: expected l2_reg of 0 or more, got {self.l2_reg!r}")

    def refusal(self, spec: LayerSpec) -> str | None:
        return None if spec.ndim else f"{self.name} takes convolutions; svd takes Linear layers"

    def max_rank(self, spec: LayerSpec) -> int:
        modes = (spec.group_out, spec.group_in, *self._spatial_modes(spec.kernel_size))
        return math.prod(modes) // max(modes)

    def stages(self, spec: LayerSpec, rank: Rank) -> tuple[LayerSpec, ...]:
        assert isinstance(rank, int)
        middle = rank * spec.groups
        last = spec.pointwise(middle, spec.out_channels, bias=spec.bias)
        return spec.pointwise(spec.in_channels, middle), *self._depthwise(spec, middle), last

    def fit(
        self, kernel: Tensor, rank: Rank, start: Factors | None = None, *, draft: bool = False
    ) -> CPFactors:
        assert isinstance(rank, int)
        begin = start.factors if isinstance(start, CPFactors) else None
        factors = cp_factors(self._joined(kernel), rank, self._options(draft), begin)
        return CPFactors(tuple(factors), tuple(kernel.shape[2:])).balanced()

    def fit_to(
        self,
        kernel: Tensor,
        rank: Rank,
        moment: SecondMoment,
        start: Factors | None = None,
        *,
        draft: bool = False,
    ) -> CPFactors:
        assert isinstance(rank, int)
        before = self._start(kernel, rank, draft) if start is None else start
        assert isinstance(before, CPFactors)
        n_iter_max = self._options(draft).n_iter_max
        fitted = fit_cp_to(kernel, before, moment, n_iter_max, self.tol * _FINER)
        return fitted if draft else better(kernel, moment, fitted, before.balanced())

    def contained_in(self, spec: LayerSpec) -> tuple[str, ...]:
        return ("svd", "lowrank", "spatial") if spec.kernel_volume == 1 else ()

    def exact_at_parity(self, spec: LayerSpec) -> bool:
        # Generic tensors of three and more modes are of about that rank. Without the ridge a fit
        # may be refused there, which only trying tells.
        return spec.kernel_volume > 1 and self.l2_reg > 0

    def limited(self, iterations: int) -> "CP":
        return replace(self, n_iter_max=min(self.n_iter_max, iterations))

    def _start(self, kernel: Tensor, rank: int, draft: bool) -> CPFactors:
        """What a fit to data starts from: a fit to the weights, or a draft's few sweeps."""
        if not draft or not kernel.any():
            return self.fit(kernel, rank)
        options = self._options(draft)
        sweeps = max(1, options.n_iter_max // 2)
        factors = few_sweeps(self._joined(kernel), rank, sweeps, options)
        return CPFactors(tuple(factors), tuple(kernel.shape[2:]))

    def factors_of(self, stage_weights: tuple[Tensor, ...]) -> CPFactors:
        first, *depthwise, last = stage_weights
        sizes = [stage.shape[2:] for stage in depthwise]
        kernel_size = tuple(max(along) for along in zip(*sizes, strict=True))
        spatial = (stage.flatten(1).T for stage in depthwise)
        return CPFactors((last.flatten(1), first.flatten(1).T, *spatial), kernel_size)

    def _joined(self, kernel: Tensor) -> Tensor:
        return kernel.reshape(*kernel.shape[:2], *self._spatial_modes(tuple(kernel.shape[2:])))

    def _options(self, draft: bool = False) -> ALSOptions:
        most = min(self.n_iter_max, DRAFT_ITERATIONS) if draft else self.n_iter_max
        sweeps = EFFORTS[self.effort]
        return ALSOptions(most, self.tol, self.l2_reg, self.random_state, sweeps, draft)

    def _spatial_modes(self, kernel_size: tuple[int, ...]) -> tuple[int, ...]:
        return (math.prod(kernel_size),)

    def _depthwise(self, spec: LayerSpec, channels: int) -> tuple[LayerSpec, ...]:
        sizes = {"in_channels": channels, "out_channels": channels, "groups": channels}
        return (spec.like(**sizes, bias=False),)


@dataclass(frozen=True)
class CPSeparable(CP):
    """As `CP`, with the depthwise step split into one layer per spatial dimension (four in 2-d)."""

    name: ClassVar[str] = "cp-separable"
    source: ClassVar[str] = "Lebedev et al. 2015"

    def contained_in(self, spec: LayerSpec) -> tuple[str, ...]:
        return (*super().contained_in(spec), CP.name)

    def _spatial_modes(self, kernel_size: tuple[int, ...]) -> tuple[int, ...]:
        return kernel_size

    def _depthwise(self, spec: LayerSpec, channels: int) -> tuple[LayerSpec, ...]:
        return tuple(
            spec.along([d], channels, channels).like(groups=channels) for d in range(spec.ndim)
        )
