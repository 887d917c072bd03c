"""Singular value decompositions, truncated ones too, Gram matrices and norms."""

import math
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from tdecomp.linalg.leading_eigenvectors import leading_eigenvectors
from tdecomp.linalg.randomized_svd import randomized_vectors

# The leading left singular vectors of a matrix, or None where an SVD is better.
Sketch = Callable[[Tensor, int], Tensor | None]

# Columns that are converted to float64 at a time when a Gram matrix is summed up, and the entries
# in them, as far as there are not fewer than the least columns.
_GRAM_CHUNK, _GRAM_ENTRIES, _GRAM_LEAST = 8192, 2**21, 512
# Rows of its lower triangle that are computed at a time: with fewer, less of the upper one is.
_GRAM_ROWS = 128
# Entries whose norms are computed at a time.
_NORM_ENTRIES = 2**20
# A Gram matrix does not resolve squared singular values below this share of their sum.
_UNRESOLVED = 1e-12
# Above these norms no entry that matters has a square that underflows.
_SMALLEST_NORMS = {torch.float32: 1e-12, torch.float64: 1e-140}
_TINY = float(np.finfo(np.float64).tiny)


def svd(matrix: Tensor, full_matrices: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.linalg.svd`; where it does not converge, LAPACK's slower gesvd, in float64."""
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=full_matrices)
    except torch.linalg.LinAlgError:
        given = matrix.detach().double().cpu().numpy()
        arrays = scipy.linalg.svd(given, full_matrices=full_matrices, lapack_driver="gesvd")
        u, s, vh = (torch.as_tensor(array).to(matrix) for array in arrays)
    return u, s, vh


def frobenius_norm(tensor: Tensor, other: Tensor | None = None) -> float:
    """The root of the sum of squares, even where the squares leave the range of float64.

    Of the tensor, or of its difference from another one, of which no copies are made.
    """
    if tensor.numel():
        # Row by row: a float32 sum over millions of entries would lose four digits.
        norms = _row_norms(tensor.detach(), None if other is None else other.detach())
        norm = float(norms.double().norm())
        if norm > _SMALLEST_NORMS[norms.dtype] and math.isfinite(norm):
            return norm
    values = tensor.detach().double()
    if other is not None:
        values = values - other.detach().double()
    scale = float(values.abs().max()) if values.numel() else 0.0
    return scale * float((values / scale).norm()) if scale else 0.0


def _row_norms(tensor: Tensor, other: Tensor | None) -> Tensor:
    """Of some rows at a time, in single precision, or in double if one of the tensors is."""
    both = [tensor] if other is None else [tensor, other]
    double = any(part.dtype == torch.float64 for part in both)
    dtype = torch.float64 if double else torch.float32
    mine, *its = (part.reshape(1 if part.dim() < 2 else len(part), -1) for part in both)
    # In one tensor from the beginning: small ones in between would keep memory from being reused.
    norms = torch.empty(len(mine), dtype=dtype, device=mine.device)
    count = max(1, _NORM_ENTRIES // max(1, mine.shape[1]))
    for at in range(0, len(mine), count):
        rows = mine[at : at + count].to(dtype)
        if its:
            rows = rows - its[0][at : at + count].to(dtype)
        norms[at : at + count] = torch.linalg.vector_norm(rows, dim=1)
    return norms


def truncated_svd(
    matrix: Tensor, rank: int, *, randomized: Sketch = randomized_vectors
) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` leading singular triplets of a matrix.

    Those of a float32 matrix come from a random sketch if `randomized` gives one, else from the
    Gram matrix of its smaller side in float64, which loses nothing that float32 resolves. If even
    gesvd does not converge, `numpy.linalg.LinAlgError` is raised.
    """
    if matrix.dtype == torch.float32:
        try:
            return _gram_svd(matrix, rank, randomized)
        except torch.linalg.LinAlgError:
            pass  # the SVD itself may still converge
    u, s, vh = svd(matrix)
    return u[:, :rank], s[:rank], vh[:rank]


def _gram_svd(matrix: Tensor, rank: int, randomized: Sketch) -> tuple[Tensor, Tensor, Tensor]:
    """The leading triplets by projection, so that at full rank the product is the matrix."""
    if matrix.shape[0] > matrix.shape[1]:
        v, s, uh = _gram_svd(matrix.T, rank, randomized)
        return uh.T, s, v.T
    u = randomized(matrix, rank)  # (rows, rank)
    if u is None:
        u = leading_eigenvectors(gram_matrix(matrix), rank).to(matrix.dtype)
    projected = u.T @ matrix  # (rank, columns)
    s = projected.norm(dim=1)
    return u, s, projected.div_(torch.where(s > 0, s, 1.0)[:, None])


def gram_matrix(matrix: Tensor, scale: float = 1.0, *, columns: Tensor | None = None) -> Tensor:
    """The lower triangle of ``matrix @ matrix.T / scale²`` in float64, some columns at a time.

    `eigh` and `eigvalsh` do not read the upper triangle, which would cost as much again. `columns`
    are numbers that the columns are multiplied by.
    """
    rows = matrix.shape[0]
    gram = torch.zeros(rows, rows, dtype=torch.float64, device=matrix.device)
    count = min(_GRAM_CHUNK, max(_GRAM_LEAST, _GRAM_ENTRIES // max(rows, 1)))
    for at in range(0, matrix.shape[1], count):
        block = matrix[:, at : at + count].double()
        if scale != 1.0:
            block = block / scale
        if columns is not None:
            block = block * columns[at : at + count]
        for start in range(0, rows, _GRAM_ROWS):
            stop = start + _GRAM_ROWS
            gram[start:stop, :stop].addmm_(block[start:stop], block[:stop].T)
    return gram


def leading_vectors(matrix: Tensor, rank: int) -> tuple[Tensor, float]:
    """The `rank` leading left singular vectors, and the share of the squares outside their span.

    Orthonormal even where the matrix has a lower rank. They come from the Gram matrix of the
    smaller side in float64, or from an SVD where that is not accurate enough.
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
        # Only their span matters: the lengths of these columns are the singular values.
        leading = torch.linalg.qr(matrix @ leading).Q
    return leading, outside


def _leading_by_svd(matrix: Tensor, rank: int) -> tuple[Tensor, float]:
    u, s, _ = svd(matrix, full_matrices=rank > matrix.shape[1])
    squares = s.double().square()
    return u[:, :rank], float(squares[rank:].sum() / squares.sum().clamp_min(_TINY))
