"""Faults that were found by breaking the library on purpose, one test each."""

import functools

import pytest
import scipy.linalg
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters

import tdecomp

FULL = tdecomp.Ratio(1.0, of="rank")


def full(model, method="svd", **options):
    return tdecomp.decompose(
        model, method, rank=FULL, allow_expansion=True, progress=False, **options
    )


def test_a_pruned_bias_is_not_lost():
    model = nn.Sequential(nn.Linear(8, 8))
    prune.random_unstructured(model[0], "bias", 0.5)
    assert "its bias is computed" in full(model).report["0"].reason


@pytest.mark.parametrize("extra", ["buffer", "module", "parameter"])
def test_a_layer_that_holds_more_is_left_alone(extra):
    layer = nn.Linear(8, 8)
    {
        "buffer": functools.partial(layer.register_buffer, "mask", torch.ones(8)),
        "module": functools.partial(layer.add_module, "mask", nn.ReLU()),
        "parameter": functools.partial(
            layer.register_parameter, "mask", nn.Parameter(torch.ones(1))
        ),
    }[extra]()
    assert full(nn.Sequential(layer)).report["0"].reason == (
        "it holds more than a weight and a bias: mask"
    )


class Holder:
    def __init__(self, layer):
        self.layer = layer


class Held(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.holder = Holder(self.fc)

    def forward(self, x):
        return self.holder.layer(x)


@pytest.mark.parametrize("inplace", [False, True])
def test_an_object_of_somebodys_own_is_looked_through(inplace):
    result = full(Held(), inplace=inplace)
    assert result.model.holder.layer is result.model.fc
    assert isinstance(result.model.fc, tdecomp.Chain)


@pytest.mark.parametrize("method", ["lowrank", "tucker2", "spatial"])
def test_autocast_stays_out_of_the_fit(method):
    layer = nn.Conv2d(8, 8, 3)
    with torch.autocast("cpu"):
        assert full(layer, method).report[""].weight_error < 1e-5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("inplace", [False, True])
def test_inference_mode_stays_out_of_the_result(tmp_path, inplace, layout):
    def net():
        return nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).to(memory_format=layout)

    model, x = net(), torch.randn(4, 8, 5, 5)
    with torch.inference_mode():
        result = full(model, "lowrank", example_inputs=x, inplace=inplace)
        result.save(tmp_path / "small")
        models = [result.model, tdecomp.load(tmp_path / "small", net())]
    with torch.inference_mode():  # and with a model that was made in it
        models.append(full(net(), "lowrank", example_inputs=x).model)
    for made in models:
        assert not any(t.is_inference() for t in (*made.parameters(), *made.buffers()))
        made(x).sum().backward()


@pytest.mark.parametrize("method", ["lowrank", "tucker2", "cp", "cp-separable"])
def test_the_default_device_stays_out_of_the_fit(method):
    layer = nn.Conv2d(4, 4, 3)
    with torch.device("meta"):
        result = tdecomp.decompose(layer, method, rank=2, allow_expansion=True, progress=False)
    assert {p.device.type for p in result.model.parameters()} == {"cpu"}


def test_views_of_one_flat_vector_are_not_tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    vector_to_parameters(parameters_to_vector(model.parameters()), model.parameters())
    assert all(row.method == "svd" for row in full(model).report)


def test_without_inputs_the_report_says_what_was_not_checked():
    assert "without example_inputs" in str(full(nn.Linear(8, 8)).report)
    assert "without" not in str(full(nn.Linear(8, 8), example_inputs=torch.randn(1, 8)).report)


def test_spectra_fall_back_and_name_their_layer(monkeypatch):
    def diverge(*_args, **_options):
        raise torch.linalg.LinAlgError("no convergence")

    model = nn.Sequential(nn.Linear(12, 8))
    expected = tdecomp.plan(model, "svd", rank=tdecomp.Energy(0.9), allow_expansion=True)["0"].rank
    monkeypatch.setattr(torch.linalg, "eigvalsh", diverge)
    plan = tdecomp.plan(model, "svd", rank=tdecomp.Energy(0.9), allow_expansion=True)
    assert plan["0"].rank == expected
    monkeypatch.setattr(torch.linalg, "svd", diverge)
    monkeypatch.setattr(scipy.linalg, "svd", diverge)
    with pytest.raises(ValueError, match=r"layer '0'.*singular values"):
        tdecomp.plan(model, "svd", rank=tdecomp.Energy(0.9))


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
@pytest.mark.parametrize("selector", [tdecomp.Energy(0.9), tdecomp.VBMF()])
def test_spectra_do_not_depend_on_the_scale(scale, selector):
    torch.manual_seed(0)
    layer = nn.Linear(40, 30, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(30, 4) @ torch.randn(4, 40) * 3 + torch.randn(30, 40))
    expected = tdecomp.plan(layer, "svd", rank=selector)[""].rank
    with torch.no_grad():
        layer.weight.mul_(scale)
    assert tdecomp.plan(layer, "svd", rank=selector)[""].rank == expected > 1


@pytest.mark.usefixtures("own_methods")
def test_a_class_may_be_registered_again_as_in_a_notebook():
    def define():
        class Mine(tdecomp.SVD):
            name = "registered-again"

        return tdecomp.register(Mine)

    assert define() is not define()


def test_names_of_a_named_optimizer_follow():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    full(model, include="0", inplace=True, optimizers=optimizer)
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]


def test_frozen_parameters_need_no_optimizer(recwarn):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    full(model, inplace=True, optimizers=optimizer)
    assert not recwarn
