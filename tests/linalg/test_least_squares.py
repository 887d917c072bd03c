"""One factor eliminated: the features of each method, and the loss and its gradient without it."""

import pytest
import torch
from torch import nn

from tdecomp.decomposers.cp import CP, cp_features
from tdecomp.decomposers.lowrank import LowRank
from tdecomp.decomposers.spatial import spatial_features
from tdecomp.decomposers.svd import SVD
from tdecomp.decomposers.tucker2 import Tucker2, tucker2_features
from tdecomp.layers.spec import LayerSpec
from tdecomp.linalg.least_squares import SeparableFit
from tdecomp.linalg.second_moment import SecondMoment
from tests.decomposers.oracle import distance
from tests.linalg.test_second_moment import both_ways, gaussian

OUT = 5
# The features of a method, the shapes of its parameters, the number of inputs and A's largest rank.
PROBLEMS = {
    "cp": (cp_features(), [(4, 4), (6, 4)], 24, None),
    "cp-separable": (cp_features(), [(4, 4), (3, 4), (2, 4)], 24, None),
    "cp-separable in 3-d": (cp_features(), [(3, 4), (3, 4), (2, 4), (2, 4)], 36, None),
    "spatial": (spatial_features(4, 3, 2), [(3, 4, 3)], 24, None),
    "tucker2": (tucker2_features(4), [(4, 2)], 24, 3),
    "tucker2 in 1-d": (tucker2_features(4), [(4, 3)], 12, 2),
}


class Problem:
    def __init__(self, name):
        self.features, shapes, self.fan_in, self.rank = PROBLEMS[name]
        self.start = [gaussian(*shape, seed=10 + i) for i, shape in enumerate(shapes)]
        self.kernel = gaussian(OUT, self.fan_in)
        self.moment = both_ways(200, self.fan_in, seed=3)[1]
        self.fit = SeparableFit(self.kernel, self.moment, self.features, self.rank)

    def projection(self, theta):
        return self.features.project(torch.eye(self.fan_in).double(), theta)  # (fan_in, features)

    def best_loss(self, theta):
        """The share of the output that the best A loses, by a dense least squares solution."""
        projection = self.projection(theta)
        values, vectors = torch.linalg.eigh(self.moment.matrix)
        root = vectors * values.clamp_min(0).sqrt() @ vectors.T
        targets = root @ self.kernel.T
        fitted = (root @ projection) @ torch.linalg.lstsq(root @ projection, targets).solution
        if self.rank is not None:
            u, s, vh = torch.linalg.svd(fitted, full_matrices=False)
            fitted = (u[:, : self.rank] * s[: self.rank]) @ vh[: self.rank]
        return ((targets - fitted).square().sum() / targets.square().sum()).item()


@pytest.fixture(params=PROBLEMS)
def problem(request):
    return Problem(request.param)


def test_project_and_inner_are_of_the_same_features(problem):
    projection = problem.projection(problem.start)
    matrix = gaussian(3, problem.fan_in, seed=5)
    assert distance(problem.features.project(matrix, problem.start), matrix @ projection) < 1e-12
    weights = gaussian(*projection.shape, seed=6)
    product = problem.features.inner(weights, problem.start)
    assert distance(product, (weights * projection).sum()) < 1e-10


def test_gradient_is_that_of_finite_differences(problem):
    theta = [part.requires_grad_() for part in problem.start]
    loss = problem.fit.loss(theta).item()
    assert loss == pytest.approx(problem.best_loss([p.detach() for p in theta]), rel=1e-5)
    directions = [gaussian(*part.shape, seed=8) for part in theta]

    def along(step):
        moved = [part.detach() + step * d for part, d in zip(theta, directions, strict=True)]
        return problem.best_loss(moved)

    numeric = (along(1e-4) - along(-1e-4)) / 2e-4
    pairs = zip(theta, directions, strict=True)
    analytic = sum((part.grad * d).sum().item() for part, d in pairs)
    assert analytic == pytest.approx(numeric, rel=1e-4)


def test_first_factor_is_the_best_for_the_others(problem):
    factor, theta = problem.fit.minimise(problem.start, n_iter_max=50, tol=1e-8)
    kernel, moment = problem.kernel, problem.moment
    lost = moment.lost(kernel - factor @ problem.projection(theta).T) / moment.lost(kernel)
    assert lost == pytest.approx(problem.best_loss(theta), rel=1e-5)
    assert lost < problem.best_loss(problem.start)
    assert not any(part.requires_grad for part in (factor, *theta))


def test_kernel_without_output_needs_no_factor():
    spec = LayerSpec.of(nn.Conv1d(4, 5, 3))
    moment = SecondMoment(matrix=torch.zeros(12, 12).double())
    for decomposer, rank in ((CP(), 2), (Tucker2(), (2, 2)), (SVD(), 2), (LowRank(), 2)):
        fitted = decomposer.fit_to(torch.zeros(spec.weight_shape).double(), rank, moment)
        assert not fitted.to_kernel().any()
