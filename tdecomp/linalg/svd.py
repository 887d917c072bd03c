"""Truncated singular value decompositions and norms.

Nothing here forms a full square factor.
"""

import math

import numpy as np
import torch
from torch import Tensor

from tdecomp.linalg.randomized_svd import sketched
from tdecomp.linalg.tensorly_backend import svd

# Columns that are turned to float64 at a time when a Gram matrix is summed up.
_GRAM_CHUNK = 8192
# Rows of its triangle that are computed at a time: fewer are wasted on the other triangle.
_GRAM_ROWS = 128
# The share of the squares below which those of a float64 matrix drown in its Gram matrix.
_UNRESOLVED = 1e-12
# Norms above which no square that matters is lost to the end of the range.
_SMALLEST_NORMS = {torch.float32: 1e-12, torch.float64: 1e-140}
_TINY = float(np.finfo(np.float64).tiny)


def frobenius_norm(tensor: Tensor) -> float:
    """The root of the sum of squares, also where the squares leave the range of float64."""
    values = tensor.detach()
    if values.numel() and values.dtype in _SMALLEST_NORMS:
        # Row by row: over millions of entries a float32 sum would lose four digits.
        rows = values.reshape(1 if values.dim() < 2 else len(values), -1)
        norm = float(torch.linalg.vector_norm(rows, dim=1).double().norm())
        if norm > _SMALLEST_NORMS[values.dtype] and math.isfinite(norm):
            return norm
    values = values.double()
    scale = float(values.abs().max()) if values.numel() else 0.0
    return scale * float((values / scale).norm()) if scale else 0.0


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` leading singular triplets of a matrix.

    >>> u, s, vh = truncated_svd(torch.eye(4), 2)
    >>> u.shape, s.shape, vh.shape
    (torch.Size([4, 2]), torch.Size([2]), torch.Size([2, 4]))

    Of a float32 matrix they come from the Gram matrix of its smaller side, in float64, so that
    squaring the singular values loses nothing that float32 could tell; for a low rank of a large
    one from a sketch, as far as that is as good.

    Raises
    ------
    numpy.linalg.LinAlgError
        If no driver converges, LAPACK's gesvd in float64 included.
    """
    if matrix.dtype == torch.float32:
        try:
            return _gram_svd(matrix, rank)
        except torch.linalg.LinAlgError:
            pass  # the SVD itself may still converge
    u, s, vh = svd(matrix)
    return u[:, :rank], s[:rank], vh[:rank]


def _gram_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading triplets by projection, so that at full rank the product is the matrix."""
    if matrix.shape[0] > matrix.shape[1]:
        v, s, uh = _gram_svd(matrix.T, rank)
        return uh.T, s, v.T
    u = sketched(matrix, rank)  # (rows, rank)
    if u is None:
        vectors = torch.linalg.eigh(gram_matrix(matrix)).eigenvectors
        u = vectors.flip(1)[:, :rank].to(matrix.dtype)
    projected = u.T @ matrix  # (rank, columns)
    s = projected.norm(dim=1)
    return u, s, projected / torch.where(s > 0, s, 1.0)[:, None]


def gram_matrix(matrix: Tensor, scale: float = 1.0) -> Tensor:
    """The lower triangle of ``matrix @ matrix.T / scale²`` in float64, some columns at a time.

    `eigh` reads no more of it, and the rest would cost as much again.
    """
    rows = matrix.shape[0]
    gram = torch.zeros(rows, rows, dtype=torch.float64, device=matrix.device)
    for chunk in matrix.split(_GRAM_CHUNK, dim=1):
        block = chunk.double()
        if scale != 1.0:
            block = block / scale
        for start in range(0, rows, _GRAM_ROWS):
            stop = min(start + _GRAM_ROWS, rows)
            gram[start:stop, :stop].addmm_(block[start:stop], block[:stop].T)
    return gram


def leading_vectors(matrix: Tensor, rank: int) -> tuple[Tensor, float]:
    """The `rank` leading left singular vectors, and the share of the squares outside their span.

    >>> vectors, outside = leading_vectors(torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), 1)
    >>> vectors.shape, outside
    (torch.Size([2, 1]), 0.2)

    Orthonormal, also where the matrix is of a lower rank. They come from the Gram matrix of the
    smaller side, in float64, or from an SVD where more is wanted than such a matrix tells.
    """
    rows, columns = matrix.shape
    by_columns = rank <= columns < rows
    try:
        values, vectors = torch.linalg.eigh(gram_matrix(matrix.T if by_columns else matrix))
    except torch.linalg.LinAlgError:
        return _leading_by_svd(matrix, rank)
    squares = values.flip(0).clamp_min(0.0)
    outside = float(squares[rank:].sum() / squares.sum().clamp_min(_TINY))
    if matrix.dtype == torch.float64 and rank < rows and outside < _UNRESOLVED:
        return _leading_by_svd(matrix, rank)
    leading = vectors.flip(1)[:, :rank].to(matrix.dtype)
    if by_columns:
        # Only the span matters, and these columns are as long as the singular values.
        leading = torch.linalg.qr(matrix @ leading).Q
    return leading, outside


def _leading_by_svd(matrix: Tensor, rank: int) -> tuple[Tensor, float]:
    u, s, _ = svd(matrix, full_matrices=rank > matrix.shape[1])
    squares = s.double().square()
    return u[:, :rank], float(squares[rank:].sum() / squares.sum().clamp_min(_TINY))
