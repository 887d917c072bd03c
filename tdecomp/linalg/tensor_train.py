"""Tensor trains of matrices: their gauge, and their fit by sweeps in the norm of a moment.

A train is a list of cores (rank, out, in, rank); its matrix has the outputs as rows.

Oseledets 2011, "Tensor-Train Decomposition"; Holtz, Rohwedder and Schneider 2012, "The alternating
linear scheme for tensor optimization in the tensor train format", section 3, for the sweeps.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tdecomp.linalg.cholesky import triangle_of
from tdecomp.linalg.second_moment import SecondMoment
from tdecomp.linalg.svd import svd
from tdecomp.linalg.tensorly_backend import mode_products, tt_svd

Cores = list[Tensor]

# On the normal equations of a core, and on the moments of single modes: shares of their diagonal.
_RIDGES = {torch.float32: 1e-6, torch.float64: 1e-12}
_MODE_RIDGE = 1e-6
# Sweeps end where one gains less than this share of what is lost.
_GAIN = 1e-3
# Unknowns of one core for each output; beyond them its normal equations take too long.
_MOST = 4096
# Inputs of which samples are summed up to a matrix.
_MOST_INPUTS = 4096


def padded(cores: Sequence[Tensor], ranks: Sequence[int]) -> Cores:
    """The same matrix with zeros up to these inner ranks."""
    bonds = [1, *ranks, 1]
    return [
        torch.nn.functional.pad(core, (0, right - core.shape[3], 0, 0, 0, 0, 0, left - len(core)))
        for core, left, right in zip(cores, bonds[:-1], bonds[1:], strict=True)
    ]


def balanced(cores: Sequence[Tensor]) -> Cores:
    """The same matrix, each inner rank's singular values shared by its two cores."""
    found = _towards_first(cores)
    for k in range(len(found) - 1):
        shape, right = found[k].shape, found[k + 1]
        u, s, vh = svd(found[k].flatten(0, 2))  # (rank · out · in, n), (n,), (n, rank)
        root = s.sqrt()
        found[k] = _filled((u * root).unflatten(0, shape[:3]), shape[3], 3)
        rest = torch.tensordot(root[:, None] * vh, right, 1)
        found[k + 1] = _filled(rest, len(right), 0)
    norms = [float(torch.linalg.vector_norm(core.double())) for core in found]
    if not all(norms):
        return found
    mean = math.exp(sum(map(math.log, norms)) / len(norms))
    return [core * (mean / norm) for core, norm in zip(found, norms, strict=True)]


def in_product_norm(
    tensor: Tensor, moment: SecondMoment, ranks: Sequence[int], **options: object
) -> Cores:
    """The TT-SVD of a tensor (*out, *in) as if the inputs' modes did not depend on each other.

    Their moment is then a Kronecker product, whose root can be taken mode by mode.
    """
    count = tensor.dim() // 2
    shape, modes = tensor.shape[count:], range(count, 2 * count)
    roots = [triangle_of(moment.along(shape, k), _MODE_RIDGE).to(tensor) for k in range(count)]
    white = mode_products(tensor, [root.T for root in roots], modes)
    cores = tt_svd(white, ranks, **options)  # type: ignore[arg-type]
    return [_unwhitened(core, root) for core, root in zip(cores, roots, strict=True)]


def _unwhitened(core: Tensor, root: Tensor) -> Tensor:
    moved = core.movedim(2, 0)  # (in, rank, out, rank)
    solved: Tensor = torch.linalg.solve_triangular(root.T, moved.flatten(1), upper=True)
    return solved.reshape(moved.shape).movedim(0, 2)


def swept(
    kernel: Tensor, cores: Sequence[Tensor], moment: SecondMoment | None, sweeps: int
) -> Cores:
    """Better cores for a kernel (out, in): in turn each is the best one for the others.

    In the norm of the moment, or that of the weights without one. A core with very many entries, or
    a moment of very many inputs, leaves the cores as they are.
    """
    unknowns = max(core[:, 0].numel() for core in cores)
    sampled = moment is not None and moment.matrix is None and moment.fan_in > _MOST_INPUTS
    if sampled or (moment is not None and unknowns > _MOST):
        return list(cores)
    fit = _Sweeps(kernel, _towards_first(cores), moment)
    lost = math.inf
    for _ in range(sweeps):
        before, lost = lost, fit.sweep()
        if before - lost <= _GAIN * lost:
            break
    return fit.cores


class _Sweeps:
    """The cores of a fit, orthonormal but for one of them, which goes there and back."""

    def __init__(self, kernel: Tensor, cores: Cores, moment: SecondMoment | None) -> None:
        self.cores, self._gram = cores, None
        outs, ins = ([core.shape[mode] for core in cores] for mode in (1, 2))
        target = kernel
        if moment is not None:
            whole = moment.normalised(kernel.dtype)
            if whole.rows is None:
                gram = whole.matrix
            else:
                gram = whole.rows.T @ whole.rows
                gram.diagonal().add_(whole.added + whole.ridge)
            assert gram is not None
            target, self._gram = kernel @ gram, gram
        self._power = float((target * kernel).sum())
        self._target = target.reshape(*outs, *ins)
        self._lefts, self._rights = [self._end(kernel)], [self._end(kernel)]
        for core in reversed(cores[1:]):
            self._rights.append(_joined_right(core, self._rights[-1]))

    @staticmethod
    def _end(like: Tensor) -> Tensor:
        return like.new_ones(1, 1, 1)

    def sweep(self) -> float:
        """All cores there and back; what is lost then, as a share."""
        last = len(self.cores) - 1
        for k in range(last):
            self._solve(k)
            self._rights.pop()
            self.cores[k], self.cores[k + 1] = _pushed_right(self.cores[k], self.cores[k + 1])
            self._lefts.append(_joined_left(self._lefts[-1], self.cores[k]))
        lost = math.inf
        for k in range(last, 0, -1):
            lost = self._solve(k)
            self._lefts.pop()
            self.cores[k - 1], self.cores[k] = _pushed_left(self.cores[k - 1], self.cores[k])
            self._rights.append(_joined_right(self.cores[k], self._rights[-1]))
        return lost

    def _solve(self, k: int) -> float:
        """Put the best core for the others in place k; the share that is lost then."""
        left, right, core = self._lefts[-1], self._rights[-1], self.cores[k]
        out, into = (side.shape[1:] for side in (left, right)), core.shape[1:3]
        (p, x), (q, y) = out
        o, i = into
        target = self._target.reshape(p, o, q, x, i, y)
        seen = torch.einsum("apx,poqxiy->aoqiy", left, target)
        seen = torch.einsum("aoqiy,bqy->oaib", seen, right)  # (out, rank, in, rank)
        best = seen
        if self._gram is not None:
            gram = self._gram.reshape(x, i, y, x, i, y)
            normal = torch.einsum("apx,cpz->axcz", left, left)
            normal = torch.einsum("axcz,xiyzjw->aciyjw", normal, gram)
            ends = torch.einsum("bqy,dqw->bydw", right, right)
            normal = torch.einsum("aciyjw,bydw->aibcjd", normal, ends)
            size = seen[0].numel()
            triangle = triangle_of(normal.reshape(size, size), _RIDGES[seen.dtype])
            best = torch.cholesky_solve(seen.flatten(1).T, triangle).T.reshape(seen.shape)
        self.cores[k] = best.transpose(0, 1)
        return 1.0 - float((seen * best).sum()) / (self._power or 1.0)


def _joined_left(left: Tensor, core: Tensor) -> Tensor:
    """The cores up to this one as (rank, outputs, inputs)."""
    joined = torch.einsum("apx,aoib->bpoxi", left, core)
    return joined.flatten(3).flatten(1, 2)


def _joined_right(core: Tensor, right: Tensor) -> Tensor:
    """The cores from this one on as (rank, outputs, inputs)."""
    joined = torch.einsum("aoib,bqy->aoqiy", core, right)
    return joined.flatten(3).flatten(1, 2)


def _towards_first(cores: Sequence[Tensor]) -> Cores:
    """The same matrix with all cores but the first orthonormal."""
    found = list(cores)
    for k in range(len(found) - 1, 0, -1):
        found[k - 1], found[k] = _pushed_left(found[k - 1], found[k])
    return found


def _pushed_left(left: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
    """The core made orthonormal, and what it was in the one on its left."""
    q, r = torch.linalg.qr(core.flatten(1).T)  # (out · in · rank, n), (n, rank)
    orthonormal = q.T.reshape(-1, *core.shape[1:])
    return _filled(left @ r.T, len(core), 3), _filled(orthonormal, len(core), 0)


def _pushed_right(core: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The core made orthonormal, and what it was in the one on its right."""
    q, r = torch.linalg.qr(core.flatten(0, 2))  # (rank · out · in, n), (n, rank)
    orthonormal = q.reshape(*core.shape[:3], -1)
    return _filled(orthonormal, len(right), 3), _filled(torch.tensordot(r, right, 1), len(right), 0)


def _filled(core: Tensor, rank: int, dim: int) -> Tensor:
    """The core with zeros up to a rank that its other sides do not have room for."""
    missing = rank - core.shape[dim]
    if not missing:
        return core
    shape = list(core.shape)
    shape[dim] = missing
    return torch.cat([core, core.new_zeros(shape)], dim=dim)
