"""Cholesky factors of matrices that are nearly definite."""

import pytest
import torch

from tdecomp.linalg.cholesky import triangle_of


def test_the_ridge_grows_until_the_matrix_is_definite():
    matrix = torch.diag(torch.tensor([1.0, 1.0, -1e-5])).double()
    triangle = triangle_of(matrix, 1e-9)
    assert torch.equal(triangle, triangle.tril())
    added = (triangle @ triangle.T - matrix).diagonal()
    torch.testing.assert_close(added, added.mean().expand(3))
    assert 1e-5 < added.mean() < 1e-4


@pytest.mark.parametrize("worst", [float("nan"), -1.0])
def test_a_matrix_that_is_far_from_definite_is_refused(worst):
    with pytest.raises(torch.linalg.LinAlgError, match="far from positive definite"):
        triangle_of(torch.diag(torch.tensor([1.0, 1.0, worst])).double(), 1e-9)
