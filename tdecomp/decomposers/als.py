"""CP factors of a kernel by alternating least squares: the start of its sweeps, and their end.

Phan et al. 2020, "Stable Low-rank Tensor Decomposition for Compression of Convolutional Neural
Network", explains why the fit has to be kept from degenerating.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from tdecomp.linalg.cp_sweeps import cp_sweeps
from tdecomp.linalg.svd import leading_vectors
from tdecomp.linalg.tensorly_backend import mode_products, unfold

_JITTER = 1e-2  # noise on the singular vectors that a fit starts from, relative to their size
_EXACT = 1e-2  # below this relative error a kernel counts as having the rank that is asked for
_WORTHWHILE = 0.5  # a kernel is compressed only if this share of its size, or less, is left
# A rank above the number of channels is found in a few sweeps only where the factors have at least
# this share of the kernel's entries.
_PARITY = 0.8
# Always on the factors, so that the normal equations of a rank-deficient kernel can be solved.
_TRACE_RIDGE = 1e-10


class Effort(NamedTuple):
    """The sweeps before and after the main part of a fit, and the tolerance until the last ones."""

    trial: int  # sweeps to find out whether the kernel has exactly the rank asked for
    last: int  # sweeps on the kernel itself and without the ridge, to recover what it cost
    coarser: float  # the factor on `tol`


EFFORTS = {"balanced": Effort(5, 4, 1.0), "quick": Effort(2, 2, 20.0)}


@dataclass(frozen=True)
class ALS:
    """The fit of CP factors to a kernel; `CP` describes the first five options.

    A ridge on the factors keeps components from growing while they cancel each other, except where
    the kernel has exactly the rank asked for. If the component norms still sum to more than
    ``max_component_norms √rank`` times the kernel's norm (for orthogonal components, to at most
    ``√rank`` times), the fit is made again with a stronger ridge; a ValueError says none is enough.
    """

    n_iter_max: int
    tol: float
    l2_reg: float
    random_state: int
    effort: str
    draft: bool = False  # only estimates what a rank loses
    max_component_norms: float = 5.0

    def fit(self, kernel: Tensor, rank: int, start: Sequence[Tensor] | None = None) -> list[Tensor]:
        """One factor (size, R) for each mode of the kernel; `start` holds some to start from."""
        norm = float(kernel.norm())
        if norm == 0.0:
            return [kernel.new_zeros(size, rank) for size in kernel.shape]
        kernel = kernel / norm
        leading = [leading_vectors(unfold(kernel, mode), rank) for mode in range(2)]
        channels, outside = [vectors for vectors, _ in leading], max(share for _, share in leading)
        core, bases = _compressed(kernel, channels)
        starts = self._starts(core, rank, [] if bases else channels, outside)
        if start is not None:
            near = _times([base.T for base in bases], [start[0] / norm, *start[1:]])
            starts = chain([(near, self.l2_reg)], starts)
        effort, bound = EFFORTS[self.effort], self.max_component_norms * rank**0.5
        last = 0 if self.draft else effort.last
        sweeps, tol = max(1, self.n_iter_max - last), self.tol * effort.coarser
        for begin, ridge in starts:
            dtype = torch.float32 if ridge else core.dtype  # enough precision with a ridge
            begin = [factor.to(dtype) for factor in begin]
            swept, _ = _sweeps(core.to(dtype), begin, sweeps, tol, ridge)
            found = _times(bases, [factor.to(core.dtype) for factor in swept])
            if last:
                found, _ = _sweeps(kernel, found, last, tol=0.0, ridge=0.0)
            if component_norms(found) <= bound:
                return [norm * found[0], *found[1:]]
        raise ValueError(
            f"CP degenerates: the component norms sum to {component_norms(found):.3g} times the "
            f"kernel's norm, expected at most {bound:.3g}; choose a lower rank or another method"
        )

    def few_sweeps(self, kernel: Tensor, rank: int) -> list[Tensor]:
        """Factors after half of the sweeps, for a draft of another kind of fit to start from."""
        start = _singular_start(kernel, rank, self.random_state)
        return _sweeps(kernel, start, max(1, self.n_iter_max // 2), self.tol, self.l2_reg)[0]

    def _starts(
        self, kernel: Tensor, rank: int, channels: Sequence[Tensor], outside: float
    ) -> Iterator[tuple[list[Tensor], float]]:
        """Factors to start from and the ridge to sweep with; all fits lose the share `outside`."""
        singular = _singular_start(kernel, rank, self.random_state, channels)
        beyond_channels = rank > max(kernel.shape[:2])
        too_few = beyond_channels and rank * sum(kernel.shape) < _PARITY * kernel.numel()
        # A kernel of exactly this rank needs no ridge; every other fit is an approximation.
        if outside <= _EXACT**2 and not too_few:
            starts = [singular]
            if rank <= min(kernel.shape[:2]) and math.prod(kernel.shape[2:]) > 1:
                # Sweeps from here find such kernels where those from singular vectors often fail.
                starts += _diagonalisation_start(kernel, rank)
            effort = EFFORTS[self.effort]
            sweeps, tol = min(effort.trial, self.n_iter_max), self.tol * effort.coarser
            tries = [_sweeps(kernel, one, sweeps, tol, ridge=0.0) for one in starts]
            factors, errors = min(tries, key=lambda fit: fit[1][-1])
            if errors[-1] < _EXACT:
                yield factors, 0.0
        for strength in (1.0, 10.0, 100.0) if self.l2_reg else (1.0,):
            yield singular, strength * self.l2_reg


def component_norms(factors: Sequence[Tensor]) -> float:
    """The sum of the Frobenius norms of the outer products of the factors' columns."""
    norms = torch.stack([factor.double().norm(dim=0) for factor in factors])  # (modes, R)
    return float(norms.prod(dim=0).sum())


def _compressed(kernel: Tensor, channels: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The kernel in the basis of its channels' leading singular vectors, and these vectors.

    Sweeps are much cheaper there, and a low-rank fit lies nearly in the span of the vectors (Bro
    and Andersson 1998, "Improving the speed of multiway algorithms: Part II. Compression"). Where
    the kernel would hardly get smaller, it is returned without any vectors.
    """
    size = math.prod(vectors.shape[1] for vectors in channels)
    if size > _WORTHWHILE * math.prod(kernel.shape[:2]):
        return kernel, []
    return mode_products(kernel, [vectors.T for vectors in channels], modes=[0, 1]), channels


def _times(bases: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """The factors, each of the first ones multiplied by its basis; without bases, all as given."""
    products = [base @ factor for base, factor in zip(bases, factors, strict=False)]
    return [*products, *factors[len(bases) :]]


def _sweeps(
    kernel: Tensor, start: Sequence[Tensor], most: int, tol: float, ridge: float
) -> tuple[list[Tensor], list[float]]:
    return cp_sweeps(kernel, start, most, tol=tol, ridge=max(ridge, _TRACE_RIDGE))


def _singular_start(
    kernel: Tensor, rank: int, random_state: int, channels: Sequence[Tensor] = ()
) -> list[Tensor]:
    """The leading singular vectors of each unfolding, filled up with seeded Gaussian columns.

    A little noise moves the start away from the saddle points of symmetric kernels, where sweeps
    would lose components for good. `channels` are the vectors of the first modes where known.
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
    out, into = (leading_vectors(unfold(kernel, mode), rank)[0] for mode in range(2))
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
        factors = [out, into, *_split_modes(spatial, kernel.shape[2:])]
    except torch.linalg.LinAlgError:
        return []
    return [factors] if all(torch.isfinite(factor).all() for factor in factors) else []


def _split_modes(joint: Tensor, sizes: torch.Size) -> list[Tensor]:
    """The nearest outer products to each column of a joint spatial factor (kernel, R)."""
    if len(sizes) == 1:
        return [joint]
    first, rest = _rank_one(joint.T.reshape(joint.shape[1], sizes[0], -1))
    return [first, *_split_modes(rest, sizes[1:])]


def _rank_one(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The leading singular pair of each of R matrices, as columns (m, R) and (n, R)."""
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    return (u[:, :, 0] * s[:, :1]).T, vh[:, 0].T
