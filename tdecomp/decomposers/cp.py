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
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac
from torch import Tensor

from tdecomp.chain import Rank
from tdecomp.decomposers.base import (
    DRAFT_ITERATIONS,
    Decomposer,
    Factors,
    better,
    check_iteration,
)
from tdecomp.layer import LayerSpec
from tdecomp.linalg import leading_vectors, mode_products, torch_backend, unfold
from tdecomp.regression import Features, SecondMoment, variable_projection

_JITTER = 1e-2
# A relative error below which the kernel counts as being of the rank asked for.
_EXACT = 1e-2
# Ranks above the channels are found in a few sweeps only where the factors have about as many
# entries as the kernel.
_PARITY = 0.8
# Above this times √rank the sum of the component norms counts as degenerate.
_MAX_COMPONENT_NORMS = 5.0
# An iteration of L-BFGS gains less than a sweep, so that a fit to data waits longer.
_FINER = 1e-4
# How many singular vectors a kernel is compressed to, in ranks, and the share of its size that the
# rest may have for that to be worth it.
_SPAN = 1.0
_WORTHWHILE = 0.5
# Always on the factors, so that the normal equations of a rank-deficient kernel can be solved.
_TRACE_RIDGE = 1e-10


@dataclass(frozen=True)
class CPFactors(Factors):
    """A kernel as a sum over r of outer products of the factors' columns.

    Attributes
    ----------
    factors : tuple of Tensor
        (out, R), (in, R), then one (k, R) per spatial mode, or a single one for all of them.
    kernel_size : tuple of int
    """

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
        return (
            into.T.reshape(*into.T.shape, *ones),  # (R, in, 1, 1)
            *depthwise,
            out.reshape(*out.shape, *ones),  # (out, R, 1, 1)
        )

    def scaled(self, scale: float) -> "CPFactors":
        share = scale ** (1 / len(self.factors))
        return replace(self, factors=tuple(factor * share for factor in self.factors))

    def component_norms(self) -> float:
        """The sum of the components' Frobenius norms."""
        norms = torch.stack([factor.double().norm(dim=0) for factor in self.factors])  # (modes, R)
        return float(norms.prod(dim=0).sum())

    def balanced(self) -> "CPFactors":
        """The same kernel, each component's norm shared equally among its factors.

        As ALS leaves them one factor holds nearly all of the norm, and its neighbours' gradients
        grow with it when the chain is trained.
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


@dataclass(frozen=True)
class Effort:
    """How long each part of a fit is given.

    Attributes
    ----------
    trial_sweeps : int
        That show whether a kernel has the very rank asked for, where it may.
    last_sweeps : int
        At the end, on the kernel itself and without the ridge, that take back what it cost.
    coarser : float
        How many times `tol` the progress of a sweep has to be for another one to be made.
    """

    trial_sweeps: int
    last_sweeps: int
    coarser: float


EFFORTS = {"balanced": Effort(5, 4, 1.0), "quick": Effort(2, 2, 20.0)}


@dataclass(frozen=True)
class ALSOptions:
    """How `parafac` is run; see `CP` for what each means."""

    n_iter_max: int
    tol: float
    l2_reg: float
    random_state: int
    effort: Effort = EFFORTS["balanced"]

    @property
    def last_sweeps(self) -> int:
        """Without the ridge; in a draft the others are worth more."""
        return 0 if self.n_iter_max <= DRAFT_ITERATIONS else self.effort.last_sweeps


def fit_cp(
    kernel: Tensor, rank: int, kernel_size: tuple[int, ...], options: ALSOptions
) -> CPFactors:
    """Alternating least squares (TensorLy's `parafac`), kept from degenerating.

    Components that grow while they cancel (Phan et al. 2020, "Stable Low-rank Tensor
    Decomposition for Compression of Convolutional Neural Network") are held down by a ridge on
    the factors, except where the kernel turns out to be of the rank asked for. Where the sum of
    the component norms still ends above ``5 √rank`` times the kernel's norm (``√rank`` is that
    of orthogonal components), the fit is made again with a stronger ridge.

    Parameters
    ----------
    kernel : Tensor, shape (out, in, *modes)
        With the spatial modes as they are, or joined into one.
    rank : int
    kernel_size : tuple of int
        The spatial modes before they were joined.
    options : ALSOptions

    Raises
    ------
    ValueError
        If the fit degenerates at every strength of the ridge.
    """
    norm = float(kernel.norm())
    if norm == 0.0:
        zeros = tuple(kernel.new_zeros(size, rank) for size in kernel.shape)
        return CPFactors(zeros, kernel_size)
    kernel = kernel / norm
    bound = _MAX_COMPONENT_NORMS * rank**0.5
    core, bases, outside = _compressed(kernel, rank)
    start = _singular_start(core, rank, options.random_state)
    # A kernel that has this very rank wants no ridge; every other fit is an approximation.
    plain = [(exact, 0.0) for exact in _exact_starts(core, rank, start, outside, options)]
    ridged = [(start, strength * options.l2_reg) for strength in (1.0, 10.0, 100.0)]
    for factors, ridge in plain + (ridged if options.l2_reg else ridged[:1]):
        swept = _sweep(core, rank, factors, ridge, options)
        outer = [base @ factor for base, factor in zip(bases, swept, strict=False)]
        found = [*outer, *swept[len(bases) :]]
        if options.last_sweeps:
            # On the kernel itself, and without the ridge.
            found, _ = _parafac(kernel, rank, found, options.last_sweeps, tol=0.0, ridge=0.0)
        fitted = CPFactors(tuple(found), kernel_size)
        if fitted.component_norms() <= bound:
            return fitted.balanced().scaled(norm)
    raise ValueError(
        f"CP degenerates: the component norms sum to {fitted.component_norms():.3g} times the "
        f"kernel's norm, expected at most {bound:.3g}; choose a lower rank or another method"
    )


def _compressed(kernel: Tensor, rank: int) -> tuple[Tensor, list[Tensor], float]:
    """The kernel in the leading singular vectors of its outputs and inputs, and these vectors.

    Sweeps cost a fraction there, and the components of a fit of a low rank lie nearly in their
    span (Bro and Andersson 1998, "Improving the speed of multiway algorithms: Part II.
    Compression"). Where little is gained the kernel as it is, and no vectors. Either way with the
    share of its squares that is outside the vectors of one mode: what no fit can reach.
    """
    sizes = [min(size, math.ceil(_SPAN * rank)) for size in kernel.shape[:2]]
    short = [mode for mode in range(2) if sizes[mode] < kernel.shape[mode]]
    leading = {mode: leading_vectors(unfold(kernel, mode), sizes[mode]) for mode in short}
    outside = max((share for _, share in leading.values()), default=0.0)
    if math.prod(sizes) > _WORTHWHILE * math.prod(kernel.shape[:2]):
        return kernel, [], outside
    bases = [
        leading[mode][0] if mode in leading else leading_vectors(unfold(kernel, mode), size)[0]
        for mode, size in enumerate(sizes)
    ]
    return mode_products(kernel, [base.T for base in bases], modes=[0, 1]), bases, outside


def _exact_starts(
    kernel: Tensor, rank: int, start: list[Tensor], outside: float, options: ALSOptions
) -> list[list[Tensor]]:
    """Factors near which the kernel has this very rank, if a few sweeps find any."""
    weights = rank * sum(kernel.shape)
    beyond_channels = rank > max(kernel.shape[:2])
    if outside > _EXACT**2 or (beyond_channels and weights < _PARITY * kernel.numel()):
        return []
    starts = [start]
    if rank <= min(kernel.shape[:2]) and math.prod(kernel.shape[2:]) > 1:
        # It finds kernels that have this rank, which singular vectors often miss.
        starts += _diagonalisation_start(kernel, rank)
    sweeps = min(options.effort.trial_sweeps, options.n_iter_max)
    tol = options.tol * options.effort.coarser
    tries = [_parafac(kernel, rank, one, sweeps, tol, ridge=0.0) for one in starts]
    factors, errors = min(tries, key=lambda fit: fit[1][-1])
    return [factors] if errors[-1] < _EXACT else []


def _sweep(
    kernel: Tensor, rank: int, start: list[Tensor], ridge: float, options: ALSOptions
) -> list[Tensor]:
    """All sweeps from `start` but the last few; with a ridge single precision is enough."""
    dtype = torch.float32 if ridge else kernel.dtype
    swept, _ = _parafac(
        kernel.to(dtype),
        rank,
        [factor.to(dtype) for factor in start],
        max(1, options.n_iter_max - options.last_sweeps),
        options.tol * options.effort.coarser,
        ridge,
    )
    return [factor.to(kernel.dtype) for factor in swept]


def _parafac(
    kernel: Tensor, rank: int, start: list[Tensor], sweeps: int, tol: float, ridge: float
) -> tuple[list[Tensor], list[float]]:
    """`sweeps` of TensorLy's parafac from `start`, and the relative errors on the way."""
    with torch_backend(), torch.no_grad():
        (weights, factors), errors = parafac(
            kernel,
            rank,
            init=CPTensor((None, start)),
            n_iter_max=sweeps,
            tol=tol,
            l2_reg=max(ridge, _TRACE_RIDGE),
            linesearch=True,
            return_errors=True,
        )
    return [factors[0] * weights, *factors[1:]], [float(error) for error in errors]


def fit_cp_to(
    kernel: Tensor, start: CPFactors, moment: SecondMoment, n_iter_max: int, tol: float
) -> CPFactors:
    """The same form in the norm of a moment: the factor of the outputs follows from the others.

    Kalle et al. 2025, "Distribution-Aware Tensor Decomposition for Compression of Convolutional
    Neural Networks", fit in this norm by alternating least squares.

    Parameters
    ----------
    kernel : Tensor, shape (out, in, *kernel)
    start : CPFactors
        Of the rank that is wanted.
    moment : SecondMoment
    """

    def khatri_rao(theta: Sequence[Tensor]) -> Tensor:
        """Columns (fan_in, R) of unit norm, the last mode changing fastest as in the kernel."""
        product = theta[0].new_ones(1, theta[0].shape[1])
        for factor in theta:
            norms = factor.norm(dim=0)
            unit = factor / torch.where(norms > 0, norms, 1.0)
            product = (product[:, None] * unit[None]).flatten(0, 1)
        return product

    others = list(start.factors[1:])
    out, theta = variable_projection(
        kernel.flatten(1),
        moment,
        Features(
            lambda matrix, theta: matrix @ khatri_rao(theta),
            lambda weights, theta: (weights * khatri_rao(theta)).sum(),
        ),
        others,
        n_iter_max=n_iter_max,
        tol=tol,
    )
    unit = [factor / factor.norm(dim=0).clamp_min(torch.finfo(out.dtype).tiny) for factor in theta]
    return replace(start, factors=(out, *unit)).balanced()


def _singular_start(kernel: Tensor, rank: int, random_state: int) -> list[Tensor]:
    """The leading singular vectors of each unfolding, filled up with seeded Gaussian columns.

    A little noise on all of them leaves the saddle points of symmetric kernels, where sweeps from
    the singular vectors themselves would lose components for good.
    """
    generator = torch.Generator("cpu").manual_seed(random_state)
    factors = []
    for mode, size in enumerate(kernel.shape):
        leading, _ = leading_vectors(unfold(kernel, mode), rank)  # (size, at most R)
        noise = torch.randn(size, rank, generator=generator, device="cpu").to(leading) / size**0.5
        known = leading.shape[1]
        factors.append(torch.cat([leading + _JITTER * noise[:, :known], noise[:, known:]], dim=1))
    return factors


def _diagonalisation_start(kernel: Tensor, rank: int) -> list[list[Tensor]]:
    """CP by the eigenvectors of a quotient of two slice mixtures (Leurgans, Ross and Abel 1993).

    Exact where the kernel has this rank; an empty list where the slices are singular.
    """
    out, _ = leading_vectors(unfold(kernel, 0), rank)
    into, _ = leading_vectors(unfold(kernel, 1), rank)
    slices = kernel.flatten(2)  # (out, in, kernel)
    core = mode_products(slices, [out.T, into.T], modes=[0, 1])  # (R, R, kernel)
    # Any two mixtures of the slices do; fixed, unequal ones keep the fit deterministic.
    position = torch.arange(1, core.shape[2] + 1, dtype=core.dtype, device=core.device)
    left, right = core @ position.sin(), core @ (2 * position).cos()
    try:
        values, vectors = torch.linalg.eig(torch.linalg.solve(right, left, left=False))
        # A complex pair spans the same plane as the real and imaginary part of one of the two.
        columns = torch.where(values.imag >= 0, vectors.real, vectors.imag)
        out = out @ (columns / columns.norm(dim=0))  # (out, R)
        rows = torch.linalg.pinv(out) @ unfold(slices, 0)  # (R, in · kernel), each of rank one
        into, spatial = _rank_one(rows.reshape(rank, slices.shape[1], -1))
        modes = [spatial] if kernel.dim() == 3 else _split_modes(spatial, kernel.shape[2:])
    except torch.linalg.LinAlgError:
        return []
    factors = [out, into, *modes]
    if not all(torch.isfinite(factor).all() for factor in factors):
        return []
    return [factors]


def _split_modes(joint: Tensor, sizes: torch.Size) -> list[Tensor]:
    """The nearest outer products to each column of a joint spatial factor (kernel, R)."""
    factors = []
    for size in sizes[:-1]:
        first, joint = _rank_one(joint.T.reshape(joint.shape[1], size, -1))
        factors.append(first)
    return [*factors, joint]


def _rank_one(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The leading singular pair of each of R matrices, as columns (m, R) and (n, R)."""
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    return (u[:, :, 0] * s[:, :1]).T, vh[:, 0].T


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

    n_iter_max: int = 100
    tol: float = 1e-4
    l2_reg: float = 1e-4
    random_state: int = 0
    effort: str = "balanced"

    def __post_init__(self) -> None:
        check_iteration(self.name, self.n_iter_max, self.tol)
        if self.effort not in tuple(EFFORTS):
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
        return (
            spec.pointwise(spec.in_channels, middle),
            *self._depthwise(spec, middle),
            spec.pointwise(middle, spec.out_channels, bias=spec.bias),
        )

    def fit(self, kernel: Tensor, rank: Rank) -> CPFactors:
        assert isinstance(rank, int)
        kernel_size = tuple(kernel.shape[2:])
        return fit_cp(
            kernel.reshape(*kernel.shape[:2], *self._spatial_modes(kernel_size)),
            rank,
            kernel_size,
            ALSOptions(
                self.n_iter_max, self.tol, self.l2_reg, self.random_state, EFFORTS[self.effort]
            ),
        )

    def fit_to(
        self, kernel: Tensor, rank: Rank, moment: SecondMoment, start: Factors | None = None
    ) -> CPFactors:
        assert isinstance(rank, int)
        before = self._start(kernel, rank) if start is None else start
        assert isinstance(before, CPFactors)
        fitted = fit_cp_to(kernel, before, moment, self.n_iter_max, self.tol * _FINER)
        draft = self.n_iter_max <= DRAFT_ITERATIONS
        return fitted if draft else better(kernel, moment, fitted, before.balanced())

    def contained_in(self, spec: LayerSpec) -> tuple[str, ...]:
        return ("svd", "lowrank", "spatial") if spec.kernel_volume == 1 else ()

    def exact_at_parity(self, spec: LayerSpec) -> bool:
        # Generic tensors of three and more modes are of about that rank. Without the ridge a fit
        # may be refused there, which only trying tells.
        return spec.kernel_volume > 1 and self.l2_reg > 0

    def brief(self, iterations: int) -> "CP":
        return replace(self, n_iter_max=min(self.n_iter_max, iterations))

    def _start(self, kernel: Tensor, rank: int) -> CPFactors:
        """What a fit to data starts from: a fit to the weights, or a draft's few sweeps."""
        if self.n_iter_max > DRAFT_ITERATIONS or not kernel.any():
            return self.fit(kernel, rank)
        kernel_size = tuple(kernel.shape[2:])
        joined = kernel.reshape(*kernel.shape[:2], *self._spatial_modes(kernel_size))
        start = _singular_start(joined, rank, self.random_state)
        factors, _ = _parafac(joined, rank, start, self.n_iter_max // 2, self.tol, self.l2_reg)
        return CPFactors(tuple(factors), kernel_size)

    def factors_of(self, stage_weights: tuple[Tensor, ...]) -> CPFactors:
        first, *depthwise, last = stage_weights
        sizes = [stage.shape[2:] for stage in depthwise]
        kernel_size = tuple(max(along) for along in zip(*sizes, strict=True))
        spatial = (stage.flatten(1).T for stage in depthwise)
        return CPFactors((last.flatten(1), first.flatten(1).T, *spatial), kernel_size)

    def _spatial_modes(self, kernel_size: tuple[int, ...]) -> tuple[int, ...]:
        return (math.prod(kernel_size),)

    def _depthwise(self, spec: LayerSpec, channels: int) -> tuple[LayerSpec, ...]:
        return (
            replace(spec, in_channels=channels, out_channels=channels, groups=channels, bias=False),
        )


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
            replace(spec.along([d], channels, channels), groups=channels) for d in range(spec.ndim)
        )
