"""The leading eigenvectors of a symmetric matrix, without computing all the others.

The matrix is reduced to a tridiagonal one by Householder's reflections, of which the wanted
eigenvectors are found by relatively robust representations (Dhillon and Parlett 2004, "Multiple
representations to compute orthogonal eigenvectors of symmetric tridiagonal matrices").
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal, lapack
from torch import Tensor

from tdecomp.runtime.scope import Scope
from tdecomp.runtime.torch_state import Shared

# Below this size, or above this share of the vectors, all of them take little more time.
_LEAST_SIZE, _LARGEST_SHARE = 1024, 0.6
_ROWS = 512  # that are copied at a time
_REFLECTIONS = 512  # that are applied at a time: each call copies them
# The eigenvectors have to be orthonormal to this.
_ORTHONORMAL = 1e-9


def leading_eigenvectors(symmetric: Tensor, rank: int) -> Tensor:
    """The eigenvectors (n, rank) of the largest eigenvalues of a symmetric matrix (n, n).

    The upper triangle is not read, and may be written to, as the matrix is often as large as all
    else together. Large matrices in double precision on the processor are reduced by SciPy on one
    thread: its own number of threads changes nothing, and torch's only how products are rounded.
    """
    size = len(symmetric)
    wanted = rank <= _LARGEST_SHARE * size and size >= _LEAST_SIZE
    if wanted and symmetric.dtype == torch.float64 and symmetric.device.type == "cpu":
        symmetric = symmetric.detach().contiguous()
        found = _some_eigenvectors(symmetric, rank)
        if found is not None:
            return found
    vectors: Tensor = torch.linalg.eigh(symmetric).eigenvectors.flip(1)
    return vectors[:, :rank]


def _some_eigenvectors(symmetric: Tensor, rank: int) -> Tensor | None:
    """The leading eigenvectors; None where LAPACK does not find them accurately enough."""
    size = len(symmetric)
    _mirror(symmetric)
    kept = symmetric.diagonal().clone()
    try:
        return _reduced_eigenvectors(symmetric.numpy(), size, rank)
    finally:
        symmetric.diagonal().copy_(kept)  # the upper triangle holds reflections by now


def _reduced_eigenvectors(matrix: NDArray[np.float64], size: int, rank: int) -> Tensor | None:
    with _OneThreadOfSciPy():
        space = int(lapack.dsytrd_lwork(size, lower=1)[0])
        reduced, diagonal, beside, scales, failed = lapack.dsytrd(
            matrix.T, lower=1, lwork=space, overwrite_a=1
        )
        if failed or not (np.isfinite(diagonal).all() and np.isfinite(beside).all()):
            return None
        try:
            _, found = eigh_tridiagonal(
                diagonal, beside, select="i", select_range=(size - rank, size - 1),
                lapack_driver="stemr",
            )  # fmt: skip
        except (np.linalg.LinAlgError, ValueError):
            return None
    vectors = torch.from_numpy(found).clone()  # (n, rank), where SciPy found room for n
    del found
    reflections, scale = torch.from_numpy(reduced), torch.from_numpy(scales)
    for start in reversed(range(0, size - 1, _REFLECTIONS)):
        stop = min(start + _REFLECTIONS, size - 1)
        below = vectors[1 + start :]
        below.copy_(torch.ormqr(reflections[1 + start :, start:stop], scale[start:stop], below))
    products = vectors.T @ vectors
    products.diagonal().sub_(1.0)
    if not float(products.abs().max()) <= _ORTHONORMAL:
        return None
    return vectors.flip(1)


def _mirror(symmetric: Tensor) -> None:
    """Copy the lower triangle to the upper one, some rows at a time."""
    for start in range(0, len(symmetric), _ROWS):
        stop = start + _ROWS
        square = symmetric[start:stop, start:stop]
        square.copy_(square.tril() + square.tril(-1).T)
        symmetric[start:stop, stop:] = symmetric[stop:, start:stop].T


class _OneThreadOfSciPy(Scope):
    """Inside, SciPy's own OpenBLAS has one thread, wherever it is that library."""

    def change(self) -> None:
        threads = _scipy_threads()
        if threads is not None:
            threads.hold(self.undo, 1)


@cache
def _scipy_threads() -> "Shared[int] | None":
    """The number of threads of the OpenBLAS in SciPy's wheels; None for another build of SciPy."""
    root = Path(scipy.__file__).parent
    folders = (root.parent / "scipy.libs", root / ".dylibs")
    for file in (file for folder in folders for file in sorted(folder.glob("*openblas*"))):
        try:
            library: Any = ctypes.CDLL(str(file))
            get: Callable[[], int] = library.scipy_openblas_get_num_threads
            put: Callable[[int], object] = library.scipy_openblas_set_num_threads
        except (OSError, AttributeError):
            continue
        return Shared(get, put)
    return None
