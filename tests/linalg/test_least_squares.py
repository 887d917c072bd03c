"""One factor eliminated: the features of each method, and the loss and its gradient without it."""

import pytest
import torch
from torch import nn

from tdecomp.decomposers.cp import CP
from tdecomp.decomposers.lowrank import LowRank
from tdecomp.decomposers.svd import SVD
from tdecomp.decomposers.tucker2 import Tucker2
from tdecomp.layers.spec import LayerSpec
from tdecomp.linalg.features import ProductFeatures, SpanFeatures
from tdecomp.linalg.least_squares import SeparableFit
from tdecomp.linalg.second_moment import SecondMoment
from tests.linalg.test_second_moment import both_ways, gaussian

OUT = 5
# The features of a method, the shapes of its parameters, the number of inputs and A's largest rank.
PROBLEMS = {
    "cp": (ProductFeatures(), [(4, 4), (6, 4)], 24, None),
    "cp-separable": (ProductFeatures(), [(4, 4), (3, 4), (2, 4)], 24, None),
    "cp-separable in 3-d": (ProductFeatures(), [(3, 4), (3, 4), (2, 4), (2, 4)], 36, None),
    "spatial": (SpanFeatures(12, 2), [(12, 3)], 24, None),
    "tucker2": (SpanFeatures(4, 6), [(4, 2)], 24, 3),
    "tucker2 in 1-d": (SpanFeatures(4, 3), [(4, 3)], 12, 2),
}


def projection(features, fan_in, theta):
    """P (fan_in, features), the inputs in their own order."""
    return features.project(features.ordered(torch.eye(fan_in).double(), 1), features.parts(theta))


class Problem:
    def __init__(self, name):
        self.features, shapes, self.fan_in, self.rank = PROBLEMS[name]
        self.start = [gaussian(*shape, seed=10 + i) for i, shape in enumerate(shapes)]
        self.kernel = gaussian(OUT, self.fan_in)
        self.moment = both_ways(200, self.fan_in, seed=3)[1].shrunk(0.1)
        self.fit = SeparableFit(self.kernel, self.moment, self.features, self.rank)

    def projection(self, theta):
        return projection(self.features, self.fan_in, theta)

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


@pytest.mark.parametrize("as_samples", [False, True])
def test_gradient_is_that_of_finite_differences(problem, as_samples):
    by_samples = both_ways(200, problem.fan_in, seed=3)[0].shrunk(0.1)
    moment = by_samples if as_samples else problem.moment
    fit = SeparableFit(problem.kernel, moment, problem.features, problem.rank)
    eliminated, theta = fit.eliminated(torch.float64), problem.start
    best = eliminated.at(theta)
    assert best.lost == pytest.approx(problem.best_loss(theta), rel=1e-5)
    directions = [gaussian(*part.shape, seed=8) for part in theta]

    def along(step):
        moved = [part + step * d for part, d in zip(theta, directions, strict=True)]
        return problem.best_loss(moved)

    numeric = (along(1e-4) - along(-1e-4)) / 2e-4
    pairs = zip(eliminated.slopes(best), directions, strict=True)
    analytic = sum((slope * d).sum().item() for slope, d in pairs)
    assert analytic == pytest.approx(numeric, rel=1e-4)


def test_first_factor_is_the_best_for_the_others(problem):
    factor, theta = problem.fit.minimise(problem.start, n_iter_max=50, tol=1e-8)
    kernel, moment = problem.kernel, problem.moment
    lost = moment.lost(kernel - factor @ problem.projection(theta).T) / moment.lost(kernel)
    assert lost == pytest.approx(problem.best_loss(theta), rel=1e-5)
    assert lost < problem.best_loss(problem.start)
    assert not any(part.requires_grad for part in (factor, *theta))


@pytest.mark.parametrize("draft", [False, True])
def test_wide_layers_are_fitted_in_single_precision_where_it_resolves_the_loss(draft):
    rows, moment = both_ways(900, 576, seed=3)
    features, start = SpanFeatures(64, 9), [gaussian(64, 8)]
    kernel = gaussian(OUT, 576)
    fits = [SeparableFit(kernel, one, features) for one in (rows, moment)]
    found = [fit.minimise(start, n_iter_max=30, tol=1e-8, draft=draft) for fit in fits]
    precise, _ = fits[0].eliminated(torch.float64).descend(start, n_iter_max=30, tol=1e-8, share=0)
    least = fits[0].eliminated(torch.float64).at(precise).lost
    for factor, theta in found:
        kept = factor @ projection(features, 576, theta).T
        lost = moment.lost(kernel - kept) / moment.lost(kernel)
        assert factor.dtype == torch.float64
        assert lost <= (1.05 if draft else 1.002) * least


def test_kernel_without_output_needs_no_factor():
    spec = LayerSpec.of(nn.Conv1d(4, 5, 3))
    moment = SecondMoment(matrix=torch.zeros(12, 12).double())
    for decomposer, rank in ((CP(), 2), (Tucker2(), (2, 2)), (SVD(), 2), (LowRank(), 2)):
        fitted = decomposer.fit_to(torch.zeros(spec.weight_shape).double(), rank, moment)
        assert not fitted.to_kernel().any()
