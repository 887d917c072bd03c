"""Conv1D of transformers, here a class of the same name, place and attributes."""

import copy
import sys
import types

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.layers.spec import LayerSpec

QUIET = {"progress": False}


class Conv1D(nn.Module):
    """As in transformers: y = x W + b for any leading dimensions, W (nx, nf), b always there."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.2)

    def forward(self, x):
        size = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


@pytest.fixture(autouse=True)
def transformers(monkeypatch):
    """transformers, of which only this class is there."""
    place = types.ModuleType("transformers.pytorch_utils")
    place.Conv1D = Conv1D
    monkeypatch.setattr(Conv1D, "__module__", place.__name__)
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, place.__name__, place)


class Block(nn.Module):
    """The feed-forward part of a GPT-2 block."""

    def __init__(self, dtype=torch.float64, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.c_fc, self.c_proj = Conv1D(48, 16), Conv1D(16, 48)
        self.to(dtype).eval()

    def forward(self, x):
        return x + self.c_proj(nn.functional.gelu(self.c_fc(x)))


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 7, 16, dtype=torch.float64, generator=generator)


def gradients(model, x):
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    return x.grad


def decomposed(model, rank, **options):
    return tdecomp.decompose(model, "svd", rank=rank, **{**QUIET, **options})


def test_at_full_rank_forward_and_backward_are_those_of_the_layer(x):
    model = Block()
    result = decomposed(model, 16, allow_expansion=True)
    first, second = result.model.c_fc
    assert (type(first), type(second)) == (nn.Linear, nn.Linear)
    torch.testing.assert_close(result.model(x), model(x))
    torch.testing.assert_close(gradients(result.model, x), gradients(model, x))
    # The gradient of the layer's weight follows from those of the chain's: W = (B A)ᵀ.
    full = model.c_fc.weight.grad.T  # (out, in)
    torch.testing.assert_close(first.weight.grad, second.weight.T @ full)
    torch.testing.assert_close(second.weight.grad, full @ first.weight.T)
    torch.testing.assert_close(second.bias.grad, model.c_fc.bias.grad)


def test_a_row_with_its_costs_and_error(x):
    model = Block()
    result = decomposed(model, 4, example_inputs=x)
    row = result.report["c_fc"]
    assert str(row.layer) == "Conv1D(16→48)"
    assert (row.params_before, row.params_after) == (16 * 48 + 48, 4 * (16 + 48) + 48)
    assert (row.macs_before, row.macs_after) == (28 * 16 * 48, 28 * 4 * (16 + 48))
    exact = torch.linalg.svdvals(model.c_fc.weight.detach()).square()
    assert row.weight_error == pytest.approx(float((exact[4:].sum() / exact.sum()).sqrt()))
    assert "Conv1D(16→48)" in str(result.report)


def test_a_fit_to_data_loses_less_of_the_outputs(x):
    model = Block()
    x = x * torch.linspace(0.01, 3, 16)
    wanted = model.c_fc(x).detach()
    lost = {}
    for name, data in (("weights", None), ("data", tdecomp.Data([x], held_out=0))):
        result = decomposed(model, 4, data=data, include="c_fc")
        lost[name] = float((result.model.c_fc(x) - wanted).detach().square().sum())
    flat = wanted.flatten(0, 1)
    variance = float((flat - flat.mean(0)).square().sum())
    assert lost["data"] < lost["weights"]
    assert lost["data"] / variance == pytest.approx(result.report["c_fc"].output_error, rel=1e-6)
    moments = tdecomp.calibrate(model, [x], **QUIET)
    assert moments["c_fc"].spec == LayerSpec.of(model.c_fc)
    assert moments["c_fc"].mean.shape == (1, 16)


def test_refit_and_reduce(x):
    model = Block()
    result = decomposed(model, 6)
    data = tdecomp.Data([x], augment=None, held_out=0)
    recovery = tdecomp.refit(result.model, model, data, **QUIET)
    assert set(recovery.layers) == {"c_fc", "c_proj"}
    assert recovery.error_after < recovery.error_before
    smaller, direct = tdecomp.reduce_ranks(result, rank=3, **QUIET), decomposed(model, 3)
    torch.testing.assert_close(smaller.model(x), direct.model(x))


def test_plans_and_files(x, tmp_path):
    model = Block()
    plan = tdecomp.plan(model, "svd", rank=4, example_inputs=x)
    again = tdecomp.Plan.from_json(plan.to_json())
    assert again["c_fc"].layer == plan["c_fc"].layer == LayerSpec(16, 48, kind="Conv1D")
    result = tdecomp.apply(model, again, **QUIET)
    result.save(tmp_path / "small.safetensors")
    loaded = tdecomp.load(tmp_path / "small.safetensors", Block(seed=1))
    assert torch.equal(loaded(x), result.model(x))
    assert torch.equal(copy.deepcopy(loaded)(x), loaded(x))


def test_it_is_timed(x):
    model = Block(torch.float32)
    times = tdecomp.profile(model, x.float(), "svd", effort="quick", **QUIET)
    assert "Conv1D(16→48)" in str(times)


def test_only_transformers_class_is_meant(monkeypatch):
    class Scaled(Conv1D):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Scaled(8, 8), Conv1D(8, 8))
    plan = tdecomp.plan(model, "svd", rank=2)
    assert plan["0"].reason == "Scaled overrides forward"
    assert plan["1"].method == "svd"
    monkeypatch.setattr(Conv1D, "__module__", "somewhere.else")
    with pytest.raises(ValueError, match="has no Linear or convolution"):
        tdecomp.plan(model, "svd", rank=2)


def test_built_needs_transformers(monkeypatch):
    spec = LayerSpec.of(Conv1D(6, 4))
    built = spec.build(torch.device("cpu"), torch.float64)
    assert (type(built), built.weight.dtype, LayerSpec.of(built)) == (Conv1D, torch.float64, spec)
    assert spec.weight_shape == (4, 6)
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", None)
    with pytest.raises(ImportError, match=r"transformers\.pytorch_utils"):
        spec.build()
