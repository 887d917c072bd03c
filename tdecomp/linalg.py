"""The factorizations everything else is made of, and the one place that sets TensorLy's backend.

Nothing here forms a full square factor, and no setting of TensorLy's outlives a call.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import tensorly
import tensorly.tenalg
import torch
from numpy.typing import NDArray
from tensorly.backend.pytorch_backend import PyTorchBackend
from tensorly.tenalg.core_tenalg import CoreTenalgBackend
from torch import Tensor

from tdecomp.parallel import each, on_cpu
from tdecomp.sketch import sketched

# Columns that are turned to float64 at a time when a Gram matrix is summed up.
_GRAM_CHUNK = 8192
# Rows of its triangle that are computed at a time: fewer are wasted on the other triangle.
_GRAM_ROWS = 128
# The share of the squares below which those of a float64 matrix drown in its Gram matrix.
_UNRESOLVED = 1e-12
# Norms above which no square that matters is lost to the end of the range.
_SMALLEST_NORMS = {torch.float32: 1e-12, torch.float64: 1e-140}
_TINY = float(np.finfo(np.float64).tiny)


def _svd(matrix: Tensor, full_matrices: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.linalg.svd`; where it does not converge LAPACK's sturdier gesvd, once, in float64."""
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=full_matrices)
    except torch.linalg.LinAlgError:
        arrays = scipy.linalg.svd(
            matrix.detach().double().cpu().numpy(),
            full_matrices=full_matrices,
            lapack_driver="gesvd",
        )
        u, s, vh = (torch.as_tensor(array).to(matrix) for array in arrays)
    return u, s, vh


class _Mttkrp:
    """The unfolding along a mode times the Khatri-Rao product of the other factors.

    TensorLy's own forms that product, which for the spatial modes of a kernel of 512×512×3×3 at
    rank 1,000 is 6 GB; contracting the largest mode first never needs more than the kernel's size
    over that mode's, times the rank. That first contraction is nearly all of the work, and kept:
    a sweep that goes through the modes in turn can use it for all that follow (Phan, Tichavský
    and Cichocki 2013, "Fast Alternating LS Algorithms for High Order CANDECOMP/PARAFAC").
    """

    def __init__(self) -> None:
        # The tensor, the factor and their product. Factors are replaced, never written to.
        self._known: tuple[Tensor, Tensor, Tensor] | None = None
        # Written to again and again: fresh memory of this size costs more than the arithmetic.
        self._buffers: dict[str, Tensor] = {}

    def __call__(
        self, tensor: Tensor, cp_tensor: tuple[Tensor | None, list[Tensor]], mode: int
    ) -> Tensor:
        weights, factors = cp_tensor
        others = [m for m in range(tensor.dim()) if m != mode]
        first = max(others, key=lambda m: (self._knows(tensor, factors[m]), tensor.shape[m]))
        partial = self._contracted(tensor, factors[first], first)  # (..., R)
        left = [m for m in range(tensor.dim()) if m != first]
        for other in (m for m in others if m != first):
            position = left.index(other)
            shape = [1] * (partial.dim() - 1) + [partial.shape[-1]]
            shape[position] = tensor.shape[other]
            product = self._buffer(f"product of {partial.dim() - 1} modes", partial, partial.shape)
            torch.mul(partial, factors[other].reshape(shape), out=product)
            partial = product.sum(dim=position)
            left.remove(other)
        return partial if weights is None else partial * weights

    def _knows(self, tensor: Tensor, factor: Tensor) -> bool:
        known = self._known
        return known is not None and known[0] is tensor and known[1] is factor

    def _contracted(self, tensor: Tensor, factor: Tensor, mode: int) -> Tensor:
        if self._known is None or not self._knows(tensor, factor):
            moved = tensor.movedim(mode, -1)
            shape = (*moved.shape[:-1], factor.shape[1])
            product = self._buffer("contraction", tensor, shape)
            torch.mm(moved.reshape(-1, len(factor)), factor, out=product.view(-1, shape[-1]))
            self._known = tensor, factor, product
        return self._known[2]

    def _buffer(self, use: str, like: Tensor, shape: Sequence[int]) -> Tensor:
        known = self._buffers.get(use)
        if known is None or known.shape != torch.Size(shape) or known.dtype != like.dtype:
            known = self._buffers[use] = like.new_empty(tuple(shape))
        return known


# An instance of TensorLy's own backend, with one function put in another's place.
_BACKEND = PyTorchBackend()
_BACKEND.svd = _svd


@contextmanager
def torch_backend() -> Iterator[None]:
    """TensorLy on torch tensors, for the length of a `with` block and this thread only."""
    algebra = CoreTenalgBackend()
    algebra.unfolding_dot_khatri_rao = _Mttkrp()
    with (
        tensorly.backend_context(_BACKEND, local_threadsafe=True),
        tensorly.tenalg.backend_context(algebra, local_threadsafe=True),
    ):
        yield


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Keep the caller's autocast, inference mode and default device out of a fit."""
    # A device context costs time on every operation: only where it changes anything.
    elsewhere = torch.get_default_device().type != device.type
    with (
        torch.autocast(device.type, enabled=False),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.device(device) if elsewhere else nullcontext(),
    ):
        yield


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """TensorLy's mode-`mode` unfolding: (shape[mode], everything else)."""
    with torch_backend():
        unfolded: Tensor = tensorly.unfold(tensor, mode)
    return unfolded


def mode_products(tensor: Tensor, matrices: Sequence[Tensor], modes: Sequence[int]) -> Tensor:
    """TensorLy's `multi_mode_dot`: each of `modes` multiplied by its matrix."""
    with torch_backend():
        product: Tensor = tensorly.tenalg.multi_mode_dot(tensor, list(matrices), modes=list(modes))
    return product


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
    u, s, vh = _svd(matrix)
    return u[:, :rank], s[:rank], vh[:rank]


def _gram_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading triplets by projection, so that at full rank the product is the matrix."""
    if matrix.shape[0] > matrix.shape[1]:
        v, s, uh = _gram_svd(matrix.T, rank)
        return uh.T, s, v.T
    u = sketched(matrix, rank)  # (rows, rank)
    if u is None:
        vectors = torch.linalg.eigh(_gram(matrix)).eigenvectors
        u = vectors.flip(1)[:, :rank].to(matrix.dtype)
    projected = u.T @ matrix  # (rank, columns)
    s = projected.norm(dim=1)
    return u, s, projected / torch.where(s > 0, s, 1.0)[:, None]


def _gram(matrix: Tensor, scale: float = 1.0) -> Tensor:
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
        values, vectors = torch.linalg.eigh(_gram(matrix.T if by_columns else matrix))
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
    u, s, _ = _svd(matrix, full_matrices=rank > matrix.shape[1])
    squares = s.double().square()
    return u[:, :rank], float(squares[rank:].sum() / squares.sum().clamp_min(_TINY))


@dataclass(frozen=True)
class Spectrum:
    """Squared singular values of an unfolding up to a common factor, descending.

    Attributes
    ----------
    squares : ndarray, shape (groups, min(shape))
        Of the unfoldings over the layer's largest entry. Round-off may leave those of a
        rank-deficient unfolding slightly negative.
    shape : tuple of int
        Rows and columns of each group's unfolding.
    """

    squares: NDArray[np.float64]
    shape: tuple[int, int]


def spectra(unfoldings: Sequence[Sequence[Tensor]]) -> list[Spectrum]:
    """For each unfolding its spectrum; an unfolding is one matrix per group, all of one shape.

    Only the squares are ever used, so the Gram matrix of the smaller side in float64 gives all
    the accuracy that a float32 kernel has, at a fraction of an SVD's cost.
    """
    # Squares of very small or large kernels leave even float64's range, and no selector minds.
    largest = max(float(matrix.detach().abs().max()) for matrix in unfoldings[0]) or 1.0
    matrices = [matrix.detach() for groups in unfoldings for matrix in groups]
    squares = each(lambda matrix: _squared_singular_values(matrix, largest), matrices, size=on_cpu)
    found = iter(squares)
    return [
        Spectrum(np.stack([next(found) for _ in groups]), (groups[0].shape[0], groups[0].shape[1]))
        for groups in unfoldings
    ]


def tails(matrix: Tensor) -> Tensor:
    """What the best approximations of rank 0, 1, 2 … lose: sums of squared singular values.

    >>> tails(torch.diag(torch.tensor([1.0, 3.0])))
    tensor([10.,  1.,  0.], dtype=torch.float64)
    """
    squares = torch.from_numpy(_squared_singular_values(matrix, 1.0)).clamp_min(0.0)
    sums = squares.flip(0).cumsum(0).flip(0)  # the smallest first, so that none is lost
    return torch.cat([sums, sums.new_zeros(1)])


def _squared_singular_values(matrix: Tensor, scale: float) -> NDArray[np.float64]:
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    # Squares of float32 entries stay in float64's range as they are.
    inner = scale if matrix.dtype == torch.float64 else 1.0
    try:
        values = torch.linalg.eigvalsh(_gram(wide, inner)).flip(0)
    except torch.linalg.LinAlgError:
        values = (_svd(wide.double() / inner)[1]) ** 2
    result: NDArray[np.float64] = values.cpu().numpy() / (scale / inner) ** 2
    return result
