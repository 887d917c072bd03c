"""CP factors of a kernel by alternating least squares: TensorLy's sweeps, well started and ended.

Phan et al. 2020, "Stable Low-rank Tensor Decomposition for Compression of Convolutional Neural
Network", on why they have to be kept from degenerating.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac
from torch import Tensor

from tdecomp.linalg.svd import leading_vectors
from tdecomp.linalg.tensorly_backend import mode_products, torch_backend, unfold

_JITTER = 1e-2
# A relative error below which the kernel counts as being of the rank asked for.
_EXACT = 1e-2
# Ranks above the channels are found in a few sweeps only where the factors have about as many
# entries as the kernel.
_PARITY = 0.8
# Above this times √rank the sum of the component norms counts as degenerate.
_MAX_COMPONENT_NORMS = 5.0
# The share of its size that a kernel may be compressed to for that to be worth it.
_WORTHWHILE = 0.5
# Always on the factors, so that the normal equations of a rank-deficient kernel can be solved.
_TRACE_RIDGE = 1e-10


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
    effort: Effort
    draft: bool = False

    @property
    def last_sweeps(self) -> int:
        """Without the ridge; in a draft the others are worth more."""
        return 0 if self.draft else self.effort.last_sweeps


def cp_factors(
    kernel: Tensor, rank: int, options: ALSOptions, start: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """One factor (size, R) for each mode of the kernel, whose sum of outer products is near it.

    Components that grow while they cancel are held down by a ridge on the factors, except where
    the kernel turns out to be of the rank asked for. Where the sum of the component norms still
    ends above ``5 √rank`` times the kernel's norm (``√rank`` is that of orthogonal components),
    the fit is made again with a stronger ridge.

    Parameters
    ----------
    kernel : Tensor, shape (out, in, *modes)
    rank : int
    options : ALSOptions
    start : sequence of Tensor, optional
        Factors to begin with, such as those of a draft.

    Raises
    ------
    ValueError
        If the fit degenerates at every strength of the ridge.
    """
    norm = float(kernel.norm())
    if norm == 0.0:
        return [kernel.new_zeros(size, rank) for size in kernel.shape]
    kernel = kernel / norm
    bound = _MAX_COMPONENT_NORMS * rank**0.5
    if start is not None:
        near = [start[0] / norm, *start[1:]]
        found = _polished(
            kernel, rank, _sweep(kernel, rank, near, options.l2_reg, options), options
        )
        if component_norms(found) <= bound:
            return [norm * found[0], *found[1:]]
    leading = [leading_vectors(unfold(kernel, mode), rank) for mode in range(2)]
    channels, outside = [vectors for vectors, _ in leading], max(share for _, share in leading)
    core, bases = _compressed(kernel, channels)
    singular = _singular_start(core, rank, options.random_state, [] if bases else channels)
    # A kernel that has this very rank wants no ridge; every other fit is an approximation.
    plain = [(exact, 0.0) for exact in _exact_starts(core, rank, singular, outside, options)]
    ridged = [(singular, strength * options.l2_reg) for strength in (1.0, 10.0, 100.0)]
    for factors, ridge in plain + (ridged if options.l2_reg else ridged[:1]):
        swept = _sweep(core, rank, factors, ridge, options)
        outer = [base @ factor for base, factor in zip(bases, swept, strict=False)]
        found = _polished(kernel, rank, [*outer, *swept[len(bases) :]], options)
        if component_norms(found) <= bound:
            return [norm * found[0], *found[1:]]
    raise ValueError(
        f"CP degenerates: the component norms sum to {component_norms(found):.3g} times the "
        f"kernel's norm, expected at most {bound:.3g}; choose a lower rank or another method"
    )


def _polished(
    kernel: Tensor, rank: int, factors: list[Tensor], options: ALSOptions
) -> list[Tensor]:
    """The last sweeps, on the kernel itself and without the ridge."""
    if not options.last_sweeps:
        return factors
    return _parafac(kernel, rank, factors, options.last_sweeps, tol=0.0, ridge=0.0)[0]


def few_sweeps(kernel: Tensor, rank: int, sweeps: int, options: ALSOptions) -> list[Tensor]:
    """Factors to begin a fit of another kind with."""
    start = _singular_start(kernel, rank, options.random_state)
    return _parafac(kernel, rank, start, sweeps, options.tol, options.l2_reg)[0]


def component_norms(factors: Sequence[Tensor]) -> float:
    """The sum of the Frobenius norms of the outer products of the factors' columns."""
    norms = torch.stack([factor.double().norm(dim=0) for factor in factors])  # (modes, R)
    return float(norms.prod(dim=0).sum())


def _compressed(kernel: Tensor, channels: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The kernel in the leading singular vectors of its outputs and inputs, and these vectors.

    Sweeps cost a fraction there, and the components of a fit of a low rank lie nearly in their
    span (Bro and Andersson 1998, "Improving the speed of multiway algorithms: Part II.
    Compression"). Where little is gained the kernel as it is, and no vectors.
    """
    size = math.prod(vectors.shape[1] for vectors in channels)
    if size > _WORTHWHILE * math.prod(kernel.shape[:2]):
        return kernel, []
    return mode_products(kernel, [vectors.T for vectors in channels], modes=[0, 1]), channels


def _exact_starts(
    kernel: Tensor, rank: int, start: list[Tensor], outside: float, options: ALSOptions
) -> list[list[Tensor]]:
    """Factors near which the kernel has this very rank, if a few sweeps find any.

    No fit reaches the share of the squares that is `outside` the leading vectors of a mode.
    """
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


def _singular_start(
    kernel: Tensor, rank: int, random_state: int, channels: Sequence[Tensor] = ()
) -> list[Tensor]:
    """The leading singular vectors of each unfolding, filled up with seeded Gaussian columns.

    `channels` are those of the first modes, where they are known.

    A little noise on all of them leaves the saddle points of symmetric kernels, where sweeps from
    the singular vectors themselves would lose components for good.
    """
    generator = torch.Generator("cpu").manual_seed(random_state)
    factors = []
    for mode, size in enumerate(kernel.shape):
        if mode < len(channels):
            leading = channels[mode]  # (size, at most R)
        else:
            leading, _ = leading_vectors(unfold(kernel, mode), rank)
        noise = torch.randn(size, rank, generator=generator, device="cpu").to(leading) / size**0.5
        count = leading.shape[1]
        factors.append(torch.cat([leading + _JITTER * noise[:, :count], noise[:, count:]], dim=1))
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
