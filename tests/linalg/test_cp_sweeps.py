"""Sweeps of alternating least squares, beside TensorLy's."""

import pytest
import tensorly
import torch
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac

from tdecomp.linalg.cp_sweeps import cp_sweeps


@pytest.mark.parametrize("tol", [0.0, 1e-2])
@pytest.mark.parametrize("shape", [(6, 8, 9), (8, 6, 9), (8, 8, 3, 3), (5, 7, 2, 3, 4)])
def test_sweeps_are_those_of_tensorly(shape, tol):
    """What is kept from one mode to the next has to be of the factors as they are by then."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
    start = [torch.randn(size, 5, generator=generator, dtype=torch.float64) for size in shape]
    before = [factor.clone() for factor in start]
    found, errors = cp_sweeps(tensor, start, 25, tol=tol, ridge=1e-3)
    options = {"n_iter_max": 25, "tol": tol, "l2_reg": 1e-3, "linesearch": True}
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        init = CPTensor((None, [factor.clone() for factor in start]))
        (_, expected), plain = parafac(tensor, 5, init=init, return_errors=True, **options)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(errors, [float(error) for error in plain])
    assert len(errors) < 25
    assert all(torch.equal(a, b) for a, b in zip(start, before, strict=True))
