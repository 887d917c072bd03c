"""The directions of a layer's outputs in which most of their power lies."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tdecomp.linalg.leading_eigenvectors import leading_eigenvectors
from tdecomp.linalg.second_moment import SecondMoment
from tdecomp.linalg.svd import gram_matrix

# From this size of both sides on, no matrix as large as the kernel is made in double precision.
LARGE = 1024
_ROWS = 512  # of a kernel that are converted at a time
# The basis that Cholesky's factor gives has to be orthonormal to this.
_ORTHONORMAL = 1e-7


def leading_outputs(kernel: Tensor, moment: SecondMoment, rank: int) -> Tensor:
    """The `rank` leading principal directions (out, rank) of the outputs ``K x``.

    ``U Uᵀ K`` is the best approximation of that rank in the norm of the moment (Zhang et al. 2016,
    equations 4 to 6). Whitening the inputs, truncating an SVD and undoing the whitening gives the
    same, but has to invert a matrix.

    A large kernel may be float32: what needs it is summed up in float64, a few rows at a time.
    """
    out, fan_in = kernel.shape
    large = is_large_kernel(kernel)
    if out <= fan_in:
        outputs = outputs_moment(kernel, moment) if large else moment.between(kernel)
        return leading_eigenvectors(outputs, rank).to(kernel.dtype)
    found = _by_cholesky(kernel, moment, rank) if large else None
    if found is not None:
        return found
    # With more outputs than inputs, the outputs lie in the span of the kernel's columns.
    basis, triangle = torch.linalg.qr(kernel.double())  # (out, fan_in), (fan_in, fan_in)
    outputs = basis @ leading_eigenvectors(moment.between(triangle), rank)
    directions: Tensor = outputs.to(kernel.dtype)
    return directions


def is_large_kernel(kernel: Tensor) -> bool:
    """Whether `leading_outputs` takes a kernel (out, in, *kernel) a few rows at a time."""
    return min(len(kernel), kernel[0].numel()) >= LARGE


def outputs_moment(
    kernel: Tensor, moment: SecondMoment | None, *, triangular: bool = False
) -> Tensor:
    """The lower triangle of ``K G Kᵀ`` (out, out) in float64, with the moment's ridge.

    Of a kernel that is upper triangular the zeros are not multiplied.
    """
    if moment is None:
        return gram_matrix(kernel)
    out, ridge = len(kernel), moment.ridge
    zeros = range(0, out, _ROWS) if triangular else [0] * -(-out // _ROWS)  # before each block
    if moment.diagonal is not None:
        return gram_matrix(kernel, columns=(moment.diagonal.double() + ridge).sqrt())
    if moment.rows is not None:
        rows = moment.rows.double()
        seen = rows.new_empty(out, len(rows))
        for some, block, at in zip(seen.split(_ROWS), _rows(kernel), zeros, strict=True):
            torch.mm(block[:, at:], rows[:, at:].T, out=some)
        del rows
        outputs = gram_matrix(seen)
        del seen
        weights = gram_matrix(kernel)
        return outputs.add_(weights, alpha=moment.added + ridge)
    assert moment.matrix is not None
    outputs = torch.zeros(out, out, dtype=torch.float64, device=kernel.device)
    shifted = moment.matrix.double()
    stop = 0
    for block, first in zip(_rows(kernel), zeros, strict=True):
        start, stop = stop, stop + len(block)
        applied = torch.add(block[:, first:] @ shifted[first:], block, alpha=ridge)
        at = 0
        for other in _rows(kernel[:stop]):
            end, behind = at + len(other), at if triangular else 0
            outputs[start:stop, at:end] = applied[:, behind:] @ other[:, behind:].T
            at = end
    return outputs


def _by_cholesky(kernel: Tensor, moment: SecondMoment, rank: int) -> Tensor | None:
    """For more outputs than inputs, by the Cholesky factor of ``Kᵀ K``; None where it is inexact.

    ``K T⁻¹`` with ``TᵀT = Kᵀ K`` is an orthonormal basis of the kernel's columns, as QR finds it,
    in a fraction of its time, as long as the condition of the kernel squared leaves some digits.
    """
    gram = gram_matrix(kernel.T)
    lower, failed = torch.linalg.cholesky_ex(gram)
    del gram
    if failed:
        return None
    inner = leading_eigenvectors(
        outputs_moment(lower.T, moment, triangular=True), rank
    )  # (fan_in, rank)
    inner = torch.linalg.solve_triangular(lower.T, inner, upper=True)
    del lower
    outputs = kernel.new_empty(len(kernel), rank)
    products = inner.new_zeros(rank, rank)
    at = 0
    for block in _rows(kernel):
        some = block @ inner
        products.addmm_(some.T, some)
        outputs[at : at + len(some)] = some
        at += len(some)
    products.diagonal().sub_(1.0)
    return outputs if float(products.abs().max()) <= _ORTHONORMAL else None


def _rows(kernel: Tensor) -> Iterator[Tensor]:
    """The rows in float64, some at a time."""
    return (block.double() for block in kernel.split(_ROWS))
