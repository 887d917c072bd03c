"""Minimising smooth functions in few evaluations."""

import pytest
import torch

from tdecomp.linalg.lbfgs import minimise


def counted(function):
    """A function of a vector as its value and gradient, and the values so far."""
    values = []

    def evaluated(point):
        with torch.enable_grad():
            point = point.detach().requires_grad_()
            value = function(point)
            (slope,) = torch.autograd.grad(value, point)
        values.append(value.item())
        return value.item(), slope

    return evaluated, values


def start(size=20):
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).double()


def test_a_well_scaled_bowl_takes_a_step():
    function, values = counted(lambda x: 0.5 * (x - 1).square().sum())
    point, value = minimise(function, start(), n_iter_max=10, tol=1e-12, share=0.0)
    torch.testing.assert_close(point, torch.ones_like(point))
    assert value < 1e-20
    assert values[1] < 1e-20


def test_a_curved_valley_is_followed_to_its_end():
    def rosenbrock(x):
        return 0.01 * (100 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum()

    function, values = counted(rosenbrock)
    point, value = minimise(function, 0.5 * start(4), n_iter_max=200, tol=0.0, share=0.0)
    torch.testing.assert_close(point, torch.ones_like(point), rtol=1e-3, atol=1e-3)
    assert value == min(values)
    assert len(values) < 150


@pytest.mark.parametrize("limits", [{"tol": 1.0, "share": 0.0}, {"tol": 0.0, "share": 0.5}])
def test_it_stops_where_little_is_gained(limits):
    scales = torch.logspace(0, -3, 20).double()
    function, values = counted(lambda x: 1 + 0.5 * (scales * x.square()).sum())
    minimise(function, start(), n_iter_max=100, **limits)
    assert 4 <= len(values) <= 5  # three iterations learn the scale


def test_a_function_that_is_not_finite_is_left():
    function, values = counted(lambda x: float("nan") * x.sum())
    point, _ = minimise(function, start(), n_iter_max=100, tol=0.0, share=0.0)
    assert torch.equal(point, start())
    assert len(values) == 1
