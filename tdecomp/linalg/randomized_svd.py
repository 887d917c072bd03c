"""The leading singular vectors of a large matrix, from a random sketch of it.

Halko, Martinsson and Tropp 2011, "Finding structure with randomness: Probabilistic algorithms for
constructing approximate matrix decompositions", algorithm 4.4.
"""

import torch
from torch import Tensor

# The sketch is faster than an SVD up to this share of the smaller side.
_LARGEST_SHARE = 1 / 8
# Columns of the sketch: this many for each vector that is wanted, and some more.
_OVERSAMPLING, _EXTRA_COLUMNS = 1.25, 16
# A sketch has converged when further passes are expected to reduce the error by at most this
# share. On spectra from flat to steep they reduce it by a third of the expected amount, or less.
_CONVERGED = 5e-3
# A share of the squared matrix that the round-off of float32 hides.
_ROUND_OFF = 1e-6


def randomized_vectors(
    matrix: Tensor, rank: int, *, smallest_side: int = 1024, max_passes: int = 12
) -> Tensor | None:
    """The `rank` leading left singular vectors of a float32 matrix, or None where an SVD is better.

    Passes over the matrix end when more of them would hardly reduce the error: it is then that of
    an SVD to about a thousandth. None for matrices of less than `smallest_side`, high ranks, errors
    too small for float32 to check, and no convergence within `max_passes`.
    """
    shortest = min(matrix.shape)
    if matrix.dtype != torch.float32 or shortest < max(smallest_side, rank / _LARGEST_SHARE):
        return None
    power = float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())
    generator = torch.Generator().manual_seed(0)
    width = int(_OVERSAMPLING * rank) + _EXTRA_COLUMNS
    test = torch.randn(matrix.shape[1], width, generator=generator, device="cpu").to(matrix)
    lost = power
    for done in range(1, max_passes + 1):
        basis = torch.linalg.qr(matrix @ test).Q  # (m, width)
        test = matrix.T @ basis  # (n, width)
        values, vectors = torch.linalg.eigh(test.double().T @ test.double())
        before, lost = lost, power - float(values[-rank:].sum())
        # The gain of a pass falls at least with the square of its number.
        expected = (before - lost) * done
        if lost <= _ROUND_OFF * power:
            return None
        if expected <= _CONVERGED * lost:
            leading: Tensor = basis @ vectors.flip(1)[:, :rank].to(matrix.dtype)
            return leading
    return None
