"""The leading singular vectors of a large matrix, from a random sketch of it.

Halko, Martinsson and Tropp 2011, "Finding structure with randomness: Probabilistic algorithms for
constructing approximate matrix decompositions", algorithm 4.4.
"""

import torch
from torch import Tensor

# Sides of a matrix at and above which, and shares of the smaller side up to which, it pays.
_LARGE = 1024
_LOW = 1 / 8
# Columns of the sketch for each wanted, and some more.
_WIDER, _MORE = 1.25, 16
_PASSES = 12
# How much more of the squares further passes may be expected to save, as a share of what is lost:
# what they do save is a third of what is expected or less, on spectra from flat to steep.
_SETTLED = 5e-3
# Shares of the squares that float32's round-off hides.
_ROUND_OFF = 1e-6


def sketched(matrix: Tensor, rank: int) -> Tensor | None:
    """The `rank` leading left singular vectors of a float32 matrix, or None where that fails.

    >>> matrix = torch.randn(1024, 1100, generator=torch.Generator().manual_seed(0))
    >>> sketched(matrix, 8).shape
    torch.Size([1024, 8])

    What is lost is known after each pass. It only ever falls, slower from one pass to the next:
    once further ones would save next to nothing, the vectors are as good as those of an SVD, to
    about a thousandth of the error. None where that takes too many passes, where so little is lost
    that it cannot be checked, and where the matrix is small or the rank high, so that a sketch
    would not be faster.

    Parameters
    ----------
    matrix : Tensor, shape (m, n)
    rank : int
    """
    shortest = min(matrix.shape)
    if matrix.dtype != torch.float32 or shortest < _LARGE or rank > _LOW * shortest:
        return None
    power = float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())
    generator = torch.Generator().manual_seed(0)
    width = int(_WIDER * rank) + _MORE
    test = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    lost = power
    for done in range(1, _PASSES + 1):
        basis = torch.linalg.qr(matrix @ test).Q  # (m, width)
        test = matrix.T @ basis  # (n, width)
        gram = test.double().T @ test.double()
        values, vectors = torch.linalg.eigh(gram)
        before, lost = lost, power - float(values[-rank:].sum())
        # The gains fall at least as the squares of the passes' numbers do.
        expected = (before - lost) * done
        if lost <= _ROUND_OFF * power:
            return None
        if expected <= _SETTLED * lost:
            leading: Tensor = basis @ vectors.flip(1)[:, :rank].to(matrix.dtype)
            return leading
    return None
