"""One watched forward pass: what it counts, what it notices, and that it leaves no trace."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tdecomp
from tdecomp.layers.geometry import Call
from tdecomp.layers.spec import LayerSpec
from tdecomp.layers.stock import STOCK_LAYERS
from tdecomp.model.example import Example
from tdecomp.model.sites import trace
from tests.models import METHODS, MODELS, torch_macs
from tests.unchanged import unchanged

each_model = pytest.mark.parametrize("name", MODELS)


def traced(model, x):
    layers = {name: m for name, m in model.named_modules() if type(m) in STOCK_LAYERS}
    return trace(model, {name: LayerSpec.of(m) for name, m in layers.items()}, x)


@each_model
@pytest.mark.parametrize("batch", [1, 3])
def test_rows_and_everything_else_are_torchs_count_before_and_after(name, batch):
    case = MODELS[name]
    model, x = case.build(), case.inputs(batch)
    result = tdecomp.decompose(
        model, METHODS, rank=0.3, example_inputs=x, allow_expansion=True, progress=False
    )
    report = result.report

    assert report.before.macs == torch_macs(model, x)
    assert report.after.macs == torch_macs(result.model, x)
    assert sum(r.macs_before for r in report) + report.everything_else.macs == report.before.macs
    assert sum(r.macs_after for r in report) + report.everything_else.macs == report.after.macs
    assert report.before.params == sum(p.numel() for p in model.parameters())
    assert report.after.params == sum(p.numel() for p in result.model.parameters())
    assert report.everything_else.macs >= 0
    assert report.everything_else.params >= 0
    changed = [row for row in report if row.method is not None]
    assert changed
    assert all(row.macs_after != row.macs_before for row in changed)


def test_macs_of_a_convolution_in_closed_form():
    case = MODELS["cnn"]
    plan = tdecomp.plan(case.build(), "lowrank", rank=2, example_inputs=case.inputs(5))
    assert plan["features.0"].macs_before == 5 * 8 * 8 * 16 * 3 * 9
    assert plan["features.3"].macs_before == 5 * 4 * 4 * 24 * 16 * 9
    assert plan["features.3"].macs_after == 5 * 4 * 4 * (2 * 16 * 9 + 24 * 2)


def test_a_layer_called_three_times_counts_three_times():
    case = MODELS["twice"]
    model = case.build()
    found = traced(model, case.inputs(4))
    assert found.calls["first"] == [Call(4)] * 3
    assert tdecomp.plan(model, "svd", rank=2, example_inputs=case.inputs(4))[
        "first"
    ].macs_before == (3 * 4 * 16 * 16)


def test_what_attention_does_with_its_weights_is_theirs_and_its_scores_are_everything_else():
    case = MODELS["attention"]
    plan = tdecomp.plan(case.build(), "svd", rank=4, example_inputs=case.inputs(2))
    assert plan.everything_else.macs == 2 * 2 * 5 * 5 * 32
    assert plan["attention.in_proj_weight"].macs_before == 2 * 5 * 32 * 32 * 3
    assert plan["attention.out_proj"].macs_before == 2 * 5 * 32 * 32


def test_the_fast_path_does_not_hide_macs():
    model = MODELS["encoder"].build().eval()
    x = MODELS["encoder"].inputs(2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() // 2 < torch_macs(model, x)
    assert traced(model, x).total_macs == torch_macs(model, x)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("training", [True, False])
@each_model
def test_nothing_is_left_behind(name, training):
    case = MODELS[name]
    model, x = case.build().train(training), case.inputs()
    Example(x).run(model).square().mean().backward()  # gradients that must stay
    random_states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    with unchanged(model):
        tdecomp.plan(model, METHODS, rank=0.3, example_inputs=x)
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]
    assert np.array_equal(np.random.get_state()[1], random_states[2])  # noqa: NPY002
    assert torch.is_grad_enabled()


class Stateful(nn.Module):
    """Counts its calls in buffers, draws random numbers, and keeps a child in its own mode."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.frozen = nn.BatchNorm1d(8).eval()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.fc(self.frozen(x + torch.rand_like(x)))


def test_buffers_modes_and_random_state_are_restored_one_by_one():
    model, x = Stateful(), torch.randn(3, 8)
    state = torch.get_rng_state()
    with unchanged(model):
        traced(model, x)
    assert model.training
    assert not model.frozen.training
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), state)


class Reassigns(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.fc(x)


def test_a_buffer_that_forward_reassigns_is_restored():
    model = Reassigns()
    with unchanged(model):
        traced(model, torch.randn(3, 8))


def test_a_buffer_of_overlapping_memory_does_not_get_in_the_way():
    model = nn.Sequential(nn.Linear(8, 8))
    model.register_buffer("shared", torch.zeros(1).expand(3))
    assert traced(model, torch.randn(3, 8)).total_macs == 3 * 64


class Fails(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.bn, self.fc, self.error = nn.BatchNorm1d(8), nn.Linear(8, 8), error

    def forward(self, x):
        self.fc(self.bn(x))
        self.fc.weight + 0
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=["error", "^C"])
def test_everything_is_restored_after_a_failure(error):
    model, x = Fails(error), torch.randn(3, 8)
    state = torch.get_rng_state()
    expected = ValueError if isinstance(error, RuntimeError) else KeyboardInterrupt
    with unchanged(model), pytest.raises(expected):
        tdecomp.plan(model, "svd", rank=2, example_inputs=x)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_a_pass_needs_no_gradients_and_no_training_mode():
    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            assert not torch.is_grad_enabled()
            assert not self.training
            return self.fc(x)

    traced(Watching(), torch.randn(3, 8))


@pytest.mark.parametrize(
    "model, x, got",
    [
        ("linear", torch.zeros(2, 5), "float32 tensor of shape (2, 5)"),
        ("linear", {"nope": torch.zeros(2, 16)}, "{nope: float32 tensor of shape (2, 16)}"),
        ("linear", "text", "(str)"),
        ("linear", [torch.zeros(2, 16)], "(float32 tensor of shape (2, 16))"),
        ("tuple", torch.zeros(2, 12), "float32 tensor of shape (2, 12)"),
        ("cnn", torch.zeros(2, 3, 8, 8).double(), "float64 tensor of shape (2, 3, 8, 8)"),
        ("tuple", (torch.zeros(2, 12), 3), "(float32 tensor of shape (2, 12), int)"),
    ],
)
def test_inputs_that_the_model_rejects(model, x, got):
    model = MODELS[model].build()
    with unchanged(model), pytest.raises(ValueError, match="the model rejected") as caught:
        tdecomp.plan(model, METHODS, rank=2, example_inputs=x)
    message = str(caught.value)
    assert got in message
    assert "Expected a tensor, a tuple of positional or a dict of keyword arguments" in message
    assert caught.value.__cause__ is not None


class Force(nn.Module):
    """The slope of an energy, for which it needs gradients in its forward."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.energy(x).sum(), x)[0]


@pytest.mark.parametrize("way", ["example_inputs", "data"])
def test_a_model_that_needs_gradients_is_told_how_to_get_them(way):
    def with_gradients(model, x):
        with torch.enable_grad():
            return model(x)

    call = partial(tdecomp.decompose, Force(), "svd", rank=2, progress=False)
    batch = torch.ones(3, 16)
    inputs = {way: batch if way == "example_inputs" else [batch]}
    with pytest.raises(ValueError, match=r"torch.enable_grad\(\)"):
        call(**inputs)
    assert call(**inputs, forward=with_gradients).report["energy.0"].method == "svd"


# Who reads a weight ------------------------------------------------------------------------------


class Reads(nn.Module):
    """Calls its layer, or not, and reads its weight in some other way."""

    def __init__(self, run):
        super().__init__()
        self.fc, self.other, self.run = nn.Linear(8, 8), nn.Linear(8, 8), run

    def forward(self, x):
        return self.other(self.run(self.fc, x))


ELSEWHERE = {
    "functional": lambda fc, x: nn.functional.linear(x, fc.weight, fc.bias),
    "functional and its own": lambda fc, x: nn.functional.linear(fc(x), fc.weight),
    "forward without hooks": lambda fc, x: fc.forward(x),
    "matmul of a view": lambda fc, x: x @ fc.weight.T,
    "data": lambda fc, x: x @ fc.weight.data,
    "its device": lambda fc, x: fc(x.to(fc.weight.device)),
    "bias": lambda fc, x: fc(x) + fc.bias,
    "in a list": lambda fc, x: fc(x) + torch.stack([fc.weight, fc.weight]).sum(),
    "keyword": lambda fc, x: torch.add(input=fc(x), other=fc.bias),
}


@pytest.mark.parametrize("way", ELSEWHERE)
def test_a_weight_that_is_read_elsewhere_leaves_its_layer_alone(way):
    model = Reads(ELSEWHERE[way])
    result = tdecomp.decompose(
        model, "svd", rank=2, example_inputs=torch.randn(2, 8), progress=False
    )
    assert result.report["fc"].method is None
    assert result.report["fc"].reason == "its weight is read outside its own forward"
    assert result.report["other"].method == "svd"
    result.model(torch.randn(2, 8))


@pytest.mark.parametrize(
    "run",
    [lambda fc, x: fc(x), lambda fc, x: fc(input=x), lambda fc, x: fc(fc(x))],
    ids=["called", "by keyword", "twice"],
)
def test_a_layer_that_is_only_called_is_replaced(run):
    x = torch.randn(2, 8)
    result = tdecomp.decompose(Reads(run), "svd", rank=2, example_inputs=x, progress=False)
    assert result.report["fc"].method == "svd"
    assert result.model(x).shape == (2, 8)


def test_a_layer_called_with_an_output_size_is_left_alone():
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(8, 8, 3, stride=2)

        def forward(self, x):
            return self.up(x, output_size=[12, 12])

    x = torch.randn(1, 8, 5, 5)
    result = tdecomp.decompose(Up(), "lowrank", rank=2, example_inputs=x, progress=False)
    assert result.report["up"].reason == "it is called with more than its input"
    assert result.model(x).shape == (1, 8, 12, 12)


def test_a_layer_that_never_runs_is_judged_by_its_parameters():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    plan = tdecomp.plan(Spare(), "svd", rank="breakeven", example_inputs=torch.randn(2, 8))
    assert plan["spare"].macs_before == 0
    assert plan["spare"].rank == plan["used"].rank == 3
    assert "by parameters" in plan["spare"].note
    assert plan["used"].note is None


@torch.no_grad()
def test_compiled_functions_are_watched_as_they_are_written_and_stay_compiled():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    # With `fullgraph` torch raises an error where it has given up compiling.
    scores = torch.compile(lambda x: x @ x.T, backend=backend, fullgraph=True)
    model, x = Reads(lambda fc, x: fc(scores(x))), torch.randn(8, 8)
    expected = model(x)
    plan = tdecomp.plan(model, "svd", rank=2, example_inputs=x, data=[x], progress=False)
    assert plan.everything_else.macs == 8 * 8 * 8
    torch.testing.assert_close(model(x), expected)
    assert len(graphs) == 1
