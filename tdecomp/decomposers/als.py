"""CP factors of a kernel by alternating least squares: TensorLy's sweeps, their start and end.

Phan et al. 2020, "Stable Low-rank Tensor Decomposition for Compression of Convolutional Neural
Network", explains why the fit has to be kept from degenerating.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac
from torch import Tensor

from tdecomp.linalg.svd import leading_vectors
from tdecomp.linalg.tensorly_backend import mode_products, torch_backend, unfold

# Noise on the singular vectors that a fit starts from, relative to their size.
_JITTER = 1e-2
# Below this relative error a kernel counts as having the rank that is asked for.
_EXACT = 1e-2
# A rank above the number of channels is found in a few sweeps only where the factors have at least
# this share of the kernel's entries.
_PARITY = 0.8
# A kernel is compressed only if this share of its size, or less, is left.
_WORTHWHILE = 0.5
# Always on the factors, so that the normal equations of a rank-deficient kernel can be solved.
_TRACE_RIDGE = 1e-10


@dataclass(frozen=True)
class Sweeps:
    """The numbers of sweeps of each part of a fit, and the tolerance of the main part."""

    trial: int  # to find out whether the kernel has exactly the rank asked for
    last: int  # at the end, on the kernel itself, to recover what the ridge cost
    coarser: float  # the factor on `tol` for the sweeps before the last ones


EFFORTS = {
    "balanced": Sweeps(trial=5, last=4, coarser=1.0),
    "quick": Sweeps(trial=2, last=2, coarser=20.0),
}


@dataclass(frozen=True)
class ALSOptions:
    """How `parafac` is run; `CP` describes the first five fields."""

    n_iter_max: int
    tol: float
    l2_reg: float
    random_state: int
    sweeps: Sweeps
    draft: bool = False  # only estimates what a rank loses
    max_component_norms: float = 5.0  # times √rank: a fit with a larger sum counts as degenerate

    @property
    def last_sweeps(self) -> int:
        """The sweeps on the kernel itself and without the ridge, none in a draft."""
        return 0 if self.draft else self.sweeps.last


def cp_factors(
    kernel: Tensor, rank: int, options: ALSOptions, start: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """One factor (size, R) for each mode of the kernel, whose sum of outer products is near it.

    A ridge on the factors keeps components from growing while they cancel each other, except where
    the kernel turns out to have exactly the rank asked for. If the sum of the component norms still
    ends above ``max_component_norms √rank`` times the kernel's norm (for orthogonal components it
    is ``√rank`` times), the fit is made again with a stronger ridge. Where no ridge is strong
    enough, it raises a ValueError. `start` holds factors to start from, such as those of a draft.
    """
    norm = float(kernel.norm())
    if norm == 0.0:
        return [kernel.new_zeros(size, rank) for size in kernel.shape]
    kernel = kernel / norm
    bound = options.max_component_norms * rank**0.5
    leading = [leading_vectors(unfold(kernel, mode), rank) for mode in range(2)]
    channels, outside = [vectors for vectors, _ in leading], max(share for _, share in leading)
    core, bases = _compressed(kernel, channels)
    near = None
    if start is not None:
        near = _times([base.T for base in bases], [start[0] / norm, *start[1:]])
    for factors, ridge in _starts(core, rank, [] if bases else channels, outside, near, options):
        found = _times(bases, _sweep(core, rank, factors, ridge, options))
        if options.last_sweeps:
            found, _ = _parafac(kernel, rank, found, options.last_sweeps, tol=0.0, ridge=0.0)
        if component_norms(found) <= bound:
            return [norm * found[0], *found[1:]]
    raise ValueError(
        f"CP degenerates: the component norms sum to {component_norms(found):.3g} times the "
        f"kernel's norm, expected at most {bound:.3g}; choose a lower rank or another method"
    )


def _times(bases: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """The factors, each of the first ones multiplied by its basis; without bases, all as given."""
    products = [base @ factor for base, factor in zip(bases, factors, strict=False)]
    return [*products, *factors[len(bases) :]]


def few_sweeps(kernel: Tensor, rank: int, sweeps: int, options: ALSOptions) -> list[Tensor]:
    """Factors after a few sweeps, for a fit of another kind to start from."""
    start = _singular_start(kernel, rank, options.random_state)
    return _parafac(kernel, rank, start, sweeps, options.tol, options.l2_reg)[0]


def component_norms(factors: Sequence[Tensor]) -> float:
    """The sum of the Frobenius norms of the outer products of the factors' columns."""
    norms = torch.stack([factor.double().norm(dim=0) for factor in factors])  # (modes, R)
    return float(norms.prod(dim=0).sum())


def _compressed(kernel: Tensor, channels: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The kernel in the basis of its channels' leading singular vectors, and these vectors.

    Sweeps are much cheaper there, and the components of a low-rank fit lie nearly in the span of
    the vectors (Bro and Andersson 1998, "Improving the speed of multiway algorithms: Part II.
    Compression"). Where the kernel would hardly get smaller, it is returned without any vectors.
    """
    size = math.prod(vectors.shape[1] for vectors in channels)
    if size > _WORTHWHILE * math.prod(kernel.shape[:2]):
        return kernel, []
    return mode_products(kernel, [vectors.T for vectors in channels], modes=[0, 1]), channels


def _starts(
    kernel: Tensor,
    rank: int,
    channels: Sequence[Tensor],
    outside: float,
    near: list[Tensor] | None,
    options: ALSOptions,
) -> Iterator[tuple[list[Tensor], float]]:
    """Factors to start from and the ridge to sweep with, in the order in which they are tried."""
    if near is not None:
        yield near, options.l2_reg
    singular = _singular_start(kernel, rank, options.random_state, channels)
    # A kernel of exactly this rank needs no ridge; every other fit is an approximation.
    for exact in _exact_starts(kernel, rank, singular, outside, options):
        yield exact, 0.0
    for strength in (1.0, 10.0, 100.0) if options.l2_reg else (1.0,):
        yield singular, strength * options.l2_reg


def _exact_starts(
    kernel: Tensor, rank: int, start: list[Tensor], outside: float, options: ALSOptions
) -> list[list[Tensor]]:
    """Factors that nearly give the kernel, if a few sweeps find any: it has this rank then.

    `outside` is the share of the squares outside the leading vectors of a mode; every fit loses it.
    """
    weights = rank * sum(kernel.shape)
    beyond_channels = rank > max(kernel.shape[:2])
    if outside > _EXACT**2 or (beyond_channels and weights < _PARITY * kernel.numel()):
        return []
    starts = [start]
    if rank <= min(kernel.shape[:2]) and math.prod(kernel.shape[2:]) > 1:
        # Sweeps from here find such kernels where those from singular vectors often fail.
        starts += _diagonalisation_start(kernel, rank)
    sweeps = min(options.sweeps.trial, options.n_iter_max)
    tol = options.tol * options.sweeps.coarser
    tries = [_parafac(kernel, rank, one, sweeps, tol, ridge=0.0) for one in starts]
    factors, errors = min(tries, key=lambda fit: fit[1][-1])
    return [factors] if errors[-1] < _EXACT else []


def _sweep(
    kernel: Tensor, rank: int, start: list[Tensor], ridge: float, options: ALSOptions
) -> list[Tensor]:
    """The sweeps from `start` except the last ones; with a ridge single precision is enough."""
    dtype = torch.float32 if ridge else kernel.dtype
    start = [factor.to(dtype) for factor in start]
    sweeps = max(1, options.n_iter_max - options.last_sweeps)
    tol = options.tol * options.sweeps.coarser
    swept, _ = _parafac(kernel.to(dtype), rank, start, sweeps, tol, ridge)
    return [factor.to(kernel.dtype) for factor in swept]


def _parafac(
    kernel: Tensor, rank: int, start: list[Tensor], sweeps: int, tol: float, ridge: float
) -> tuple[list[Tensor], list[float]]:
    """`sweeps` of TensorLy's parafac from `start`, and the relative errors on the way."""
    options = {"n_iter_max": sweeps, "tol": tol, "l2_reg": max(ridge, _TRACE_RIDGE)}
    with torch_backend(), torch.no_grad():
        (weights, factors), errors = parafac(
            kernel,
            rank,
            init=CPTensor((None, start)),
            linesearch=True,
            return_errors=True,
            **options,
        )
    return [factors[0] * weights, *factors[1:]], [float(error) for error in errors]


def _singular_start(
    kernel: Tensor, rank: int, random_state: int, channels: Sequence[Tensor] = ()
) -> list[Tensor]:
    """The leading singular vectors of each unfolding, filled up with seeded Gaussian columns.

    A little noise moves the start away from the saddle points of symmetric kernels, where sweeps
    from the singular vectors themselves would lose components for good. `channels` are the vectors
    of the first modes where they are known already.
    """
    generator = torch.Generator("cpu").manual_seed(random_state)
    factors = []
    for mode, size in enumerate(kernel.shape):
        known = mode < len(channels)
        leading = channels[mode] if known else leading_vectors(unfold(kernel, mode), rank)[0]
        noise = torch.randn(size, rank, generator=generator, device="cpu").to(leading) / size**0.5
        count = leading.shape[1]
        factors.append(torch.cat([leading + _JITTER * noise[:, :count], noise[:, count:]], dim=1))
    return factors


def _diagonalisation_start(kernel: Tensor, rank: int) -> list[list[Tensor]]:
    """CP by the eigenvectors of a quotient of two slice mixtures (Leurgans, Ross and Abel 1993).

    Exact where the kernel has this rank. The list is empty where the slices are singular.
    """
    out, _ = leading_vectors(unfold(kernel, 0), rank)
    into, _ = leading_vectors(unfold(kernel, 1), rank)
    slices = kernel.flatten(2)  # (out, in, kernel)
    core = mode_products(slices, [out.T, into.T], modes=[0, 1])  # (R, R, kernel)
    # Any two different mixtures of the slices work; fixed ones keep the fit deterministic.
    position = torch.arange(1, core.shape[2] + 1, dtype=core.dtype, device=core.device)
    left, right = core @ position.sin(), core @ (2 * position).cos()
    try:
        values, vectors = torch.linalg.eig(torch.linalg.solve(right, left, left=False))
        # A conjugate pair spans the same plane as the real and the imaginary part of one of them.
        columns = torch.where(values.imag >= 0, vectors.real, vectors.imag)
        out = out @ (columns / columns.norm(dim=0))  # (out, R)
        rows = torch.linalg.pinv(out) @ unfold(slices, 0)  # (R, in · kernel), each of rank one
        into, spatial = _rank_one(rows.reshape(rank, slices.shape[1], -1))
        modes = [spatial] if kernel.dim() == 3 else _split_modes(spatial, kernel.shape[2:])
    except torch.linalg.LinAlgError:
        return []
    factors = [out, into, *modes]
    return [factors] if all(torch.isfinite(factor).all() for factor in factors) else []


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
