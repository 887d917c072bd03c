"""One layer fitted: the numbers it reports, what it can be pickled with, drafts and starts."""

import pickle

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.decomposers.assemble import assemble
from tdecomp.decomposers.fit_layer import factorize, fit_layer, relative_error
from tdecomp.decomposers.registry import get_decomposer
from tdecomp.layers.spec import LayerSpec
from tests.recovery.networks import QUIET

METHODS = ["lowrank", "spatial", "tucker2", "cp", "cp-separable"]


def layer_and_moments(groups=1):
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 12, 3, padding=1, groups=groups)
    moments = tdecomp.calibrate(nn.Sequential(layer), [torch.randn(16, 8, 6, 6)], **QUIET)
    return layer, moments["0"]


def rank_of(method, value):
    return (value, value) if method == "tucker2" else value


@pytest.mark.parametrize("method", METHODS)
def test_arguments_and_result_can_be_pickled(method):
    layer, moments = layer_and_moments(groups=2)
    spec, decomposer = LayerSpec.of(layer), get_decomposer(method)
    given = (layer.weight, spec, decomposer, rank_of(method, 2), moments)
    fitted = fit_layer(*given)
    again = fit_layer(*pickle.loads(pickle.dumps(given)))
    back = pickle.loads(pickle.dumps(fitted))
    for other in (again, back):
        assert torch.equal(other.factors.to_kernel(), fitted.factors.to_kernel())
        assert other.output_error == fitted.output_error
    assert torch.equal(back.shift, fitted.shift)


@pytest.mark.parametrize("method", METHODS)
def test_its_errors_are_those_of_the_chain(method):
    layer, moments = layer_and_moments()
    spec, decomposer, rank = LayerSpec.of(layer), get_decomposer(method), rank_of(method, 4)
    fitted = fit_layer(layer.weight, spec, decomposer, rank, moments)
    chain = assemble(layer, decomposer, rank, fitted.factors, fitted.shift)
    kernel = decomposer.factors_in(chain).to_kernel()
    assert fitted.weight_error == pytest.approx(relative_error(layer.weight, kernel), rel=1e-4)
    x = torch.randn(64, 8, 6, 6)
    with torch.no_grad():
        wanted, got = layer(x).double(), chain(x).double()
    lost = (wanted - got).square().mean() / (wanted - wanted.mean((0, 2, 3), True)).square().mean()
    assert fitted.output_error == pytest.approx(float(lost), rel=0.3)


def test_a_draft_is_an_argument_whatever_the_iterations():
    layer, _ = layer_and_moments()
    spec = LayerSpec.of(layer)
    for iterations in (7, 8, 9):
        method = tdecomp.CP(n_iter_max=iterations, tol=0.0)
        whole = fit_layer(layer.weight, spec, method, 8).weight_error
        draft = fit_layer(layer.weight, spec, method, 8, draft=True).weight_error
        assert whole != draft  # only one of them has last sweeps without the ridge
    errors = [
        fit_layer(layer.weight, spec, tdecomp.CP(n_iter_max=n, tol=0.0), 8).weight_error
        for n in (7, 8, 9, 10)
    ]
    assert max(errors) < 1.05 * min(errors)


@pytest.mark.parametrize("method", ["spatial", "tucker2", "cp"])
def test_a_start_is_improved_on(method):
    layer, moments = layer_and_moments()
    spec, decomposer, rank = LayerSpec.of(layer), get_decomposer(method), rank_of(method, 4)
    draft = fit_layer(layer.weight, spec, decomposer, rank, moments, draft=True)
    fitted = fit_layer(layer.weight, spec, decomposer, rank, moments, draft.factors)
    assert fitted.output_error <= draft.output_error * (1 + 1e-6)
    plain = fit_layer(layer.weight, spec, decomposer, rank, draft=True)
    better = fit_layer(layer.weight, spec, decomposer, rank, start=plain.factors)
    assert better.weight_error <= plain.weight_error * (1 + 1e-4)


def test_factors_that_are_not_finite_are_refused():
    class Broken(tdecomp.SVD):
        name = "broken"

        def fit(self, kernel, rank):
            return super().fit(kernel, rank).scaled(float("nan"))

    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="not finite"):
        fit_layer(layer.weight, LayerSpec.of(layer), Broken(), 2)
    with pytest.raises(ValueError, match=r"layer '0' .* not finite.*exclude=\['0'\]"):
        tdecomp.decompose(nn.Sequential(layer), Broken(), rank=2, allow_expansion=True, **QUIET)


def test_a_method_from_outside_needs_no_further_arguments():
    class Mine(tdecomp.SVD):
        name = "mine"

        def fit(self, kernel, rank):
            return super().fit(kernel, rank)

    layer = nn.Linear(6, 6)
    factors = factorize(Mine(), layer.weight, LayerSpec.of(layer), 6, draft=True)
    assert relative_error(layer.weight, factors.to_kernel()) < 1e-5


def test_matmul_precision_stays_out_of_fits():
    layer = nn.Linear(64, 64)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        fitted = fit_layer(layer.weight, LayerSpec.of(layer), tdecomp.SVD(), 64)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert fitted.weight_error < 1e-6
