"""Kernels with more outputs than inputs, in coordinates of the space that their columns span.

The outputs ``K x`` of such a kernel (out, in) lie in a space of only `in` dimensions. With an
orthonormal basis Q of it and ``K = Q R``, approximations of R (in, in) lose what those of K lose,
and no matrix of size (out, out) has to be decomposed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tdecomp.linalg.svd import gram_matrix

_ROWS = 512  # that are computed at a time
# The basis that Cholesky's factor gives has to be orthonormal to this.
_ORTHONORMAL = 1e-9
# Of the squares of a column, the least share outside the span of those before it.
_LEFT = 1e-6


def in_column_spaces(
    kernels: Sequence[Tensor], importance: Tensor | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """For kernels (out_i, in) the R_i, and the importance (out, out) of all outputs as theirs.

    R_i is upper triangular and in float64 where the kernel has more outputs than inputs, and is the
    kernel itself elsewhere. The importance is Qᵀ H Q for the block-diagonal Q of all bases.
    """
    if importance is None:
        return [_triangle(kernel) if _is_tall(kernel) else kernel for kernel in kernels], None
    bases: list[Tensor | None] = []
    inner: list[Tensor] = []
    for kernel in kernels:
        basis, triangle = _basis(kernel) if _is_tall(kernel) else (None, kernel)
        bases.append(basis)
        inner.append(triangle)
    if all(basis is None for basis in bases):
        return inner, importance
    return inner, _in_bases(importance, bases, [len(kernel) for kernel in kernels])


def _is_tall(kernel: Tensor) -> bool:
    return kernel.shape[0] > kernel.shape[1]


def _triangle(kernel: Tensor) -> Tensor:
    """R (in, in) alone."""
    lower = _cholesky_factor(kernel)
    if lower is None:
        lower = torch.linalg.qr(kernel.double(), mode="r").R.T
    triangle: Tensor = lower.T
    return triangle


def _basis(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Q (out, in) with orthonormal columns, and R (in, in), both in float64."""
    lower = _cholesky_factor(kernel)
    if lower is not None:
        basis = torch.empty(kernel.shape, dtype=torch.float64, device=kernel.device)
        for some, block in zip(basis.split(_ROWS), kernel.split(_ROWS), strict=True):
            some.copy_(
                torch.linalg.solve_triangular(lower.T, block.double(), upper=True, left=False)
            )
        products = gram_matrix(basis.T)
        products.diagonal().sub_(1.0)
        if float(products.abs_().max()) <= _ORTHONORMAL:
            return basis, lower.T
        del basis, products
    found: tuple[Tensor, Tensor] = torch.linalg.qr(kernel.double())
    return found


def _cholesky_factor(kernel: Tensor) -> Tensor | None:
    """Rᵀ from ``Kᵀ K``, in a fraction of the time of QR; None where too few digits are left.

    They are lost where a column is nearly in the span of those before it, whatever its length.
    """
    gram = gram_matrix(kernel.T)
    lower, failed = torch.linalg.cholesky_ex(gram)
    left = lower.diagonal().square() / gram.diagonal()
    found: Tensor | None = lower if not failed and float(left.min()) >= _LEFT else None
    return found


def _in_bases(symmetric: Tensor, bases: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    """``Qᵀ H Q`` of a symmetric H, whose entries above the diagonal are not read.

    Q is block-diagonal with these bases, of as many rows each; None stands for the identity.
    """
    counts = [n if b is None else b.shape[1] for b, n in zip(bases, sizes, strict=True)]
    found = symmetric.new_zeros(sum(counts), sum(counts), dtype=torch.float64)
    rows = symmetric.split([*sizes])
    for i, (mine, places) in enumerate(zip(bases, found.split(counts), strict=True)):
        for j, into in enumerate(places.split(counts, dim=1)[: i + 1]):
            block = rows[i].split([*sizes], dim=1)[j]
            for at in range(0, sizes[i], _ROWS):
                some, other = block[at : at + _ROWS].double(), bases[j]
                if i == j:  # half of it: the entries below the diagonal, and half of those on it
                    some = some[:, : at + len(some)].tril(at)
                    some.diagonal(at).mul_(0.5)
                right = some if other is None else some @ other[: some.shape[1]]
                if mine is None:
                    into[at : at + len(some), : right.shape[1]] += right
                else:
                    into[:, : right.shape[1]].addmm_(mine[at : at + _ROWS].T, right)
    return found.add_(found.T.clone())
