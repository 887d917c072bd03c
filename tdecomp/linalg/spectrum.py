"""Squared singular values of unfoldings."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tdecomp.linalg.svd import gram_matrix, svd
from tdecomp.runtime.parallel import on_cpu, parallel_map


@dataclass(frozen=True)
class Spectrum:
    """Squared singular values of an unfolding up to a common factor, descending.

    Round-off may make the zeros of a rank-deficient unfolding slightly negative.
    """

    squares: NDArray[np.float64]  # (groups, min(shape)), divided by the largest entry's square
    shape: tuple[int, int]  # rows and columns of each group's unfolding


def spectra(unfoldings: Sequence[Sequence[Tensor]]) -> list[Spectrum]:
    """The spectrum of each unfolding, given as one matrix for each group, all of one shape.

    The Gram matrix in float64 gives squares as accurate as a float32 kernel, and costs less.
    """
    # Squares of very small or large kernels leave even the range of float64. Selectors only compare
    # the values of one layer, so a common factor does not matter.
    largest = max(float(matrix.detach().abs().max()) for matrix in unfoldings[0]) or 1.0
    matrices = [matrix.detach() for groups in unfoldings for matrix in groups]
    squared = partial(_squared_singular_values, scale=largest)
    found = iter(parallel_map(squared, matrices, size=on_cpu))
    stacks = [np.stack([next(found) for _ in groups]) for groups in unfoldings]
    shapes = [(len(groups[0]), groups[0].shape[1]) for groups in unfoldings]
    return list(map(Spectrum, stacks, shapes))


def tails(matrix: Tensor) -> Tensor:
    """The squared errors of the best approximations of rank 0, 1, 2 and so on."""
    return tails_of(torch.from_numpy(_squared_singular_values(matrix, 1.0)))


def tails_of(squares: Tensor) -> Tensor:
    """The sums of all but the first 0, 1, 2 and so on; round-off may have made some negative."""
    squares = squares.clamp_min(0.0)
    sums = squares.flip(0).cumsum(0).flip(0)  # smallest first: no small one is rounded away
    return torch.cat([sums, sums.new_zeros(1)])


def _squared_singular_values(matrix: Tensor, scale: float) -> NDArray[np.float64]:
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    # Squares of float32 entries stay in the range of float64 without scaling.
    inner = scale if matrix.dtype == torch.float64 else 1.0
    try:
        values = torch.linalg.eigvalsh(gram_matrix(wide, inner)).flip(0)
    except torch.linalg.LinAlgError:
        values = (svd(wide.double() / inner)[1]) ** 2
    result: NDArray[np.float64] = values.cpu().numpy() / (scale / inner) ** 2
    return result
