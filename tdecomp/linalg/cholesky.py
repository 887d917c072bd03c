"""Cholesky factors of matrices that round-off may have made indefinite."""

import torch
from torch import Tensor

_GROWTH, _MOST = 10.0, 1e-2


def triangle_of(symmetric: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor L of ``L Lᵀ``, with the least ridge that makes the matrix definite.

    It is a share of the mean on the diagonal, and grows from the given one.
    """
    mean = float(symmetric.diagonal().mean()) or 1.0
    while True:
        shifted = symmetric.clone()
        shifted.diagonal().add_(ridge * mean)
        triangle: Tensor
        triangle, info = torch.linalg.cholesky_ex(shifted)
        if not info:
            return triangle
        if ridge > _MOST:  # it holds NaN or infinities
            raise torch.linalg.LinAlgError("a matrix is far from positive definite")
        ridge *= _GROWTH
