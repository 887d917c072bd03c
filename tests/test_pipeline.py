"""decompose and apply: what is kept, what is told, and that an error changes nothing."""

import random
from dataclasses import replace

import numpy as np
import pytest
import tensorly
import torch
from torch import nn

import tdecomp
from tdecomp.layers.chain import Chain
from tdecomp.model.batches import call_with
from tests.models import METHODS, MODELS
from tests.unchanged import unchanged

CONV_METHODS = ("lowrank", "tucker2", "cp", "cp-separable")


def decompose(model, methods=METHODS, rank=2, **options):
    return tdecomp.decompose(model, methods, rank=rank, **{"progress": False, **options})


@pytest.mark.parametrize("name", MODELS)
def test_the_given_model_is_untouched_and_the_copy_runs(name):
    case = MODELS[name]
    model, x = case.build(), case.inputs()
    with unchanged(model):
        result = decompose(model, example_inputs=x)
    assert result.model is not model
    assert any(row.method for row in result.report)
    assert isinstance(result.model, nn.Module)
    with torch.no_grad():
        before, after = (call_with(m.eval(), x) for m in (model, result.model))
    assert after.shape == before.shape
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("linear", "conv")])
def test_in_place_and_on_a_copy_are_the_same(name):
    case = MODELS[name]
    x = case.inputs()
    first, second = decompose(case.build()), decompose(model := case.build(), inplace=True)
    assert second.model is model
    with torch.no_grad():
        assert torch.equal(*(call_with(r.model.eval(), x) for r in (first, second)))


@pytest.mark.parametrize("methods", [("svd", method) for method in CONV_METHODS])
def test_the_backward_pass_reaches_every_new_parameter(methods):
    model = decompose(MODELS["cnn"].build(), methods).model
    model(MODELS["cnn"].inputs()).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_full_rank_is_the_same_function():
    case = MODELS["cnn"]
    model, x = case.build().double().eval(), case.inputs().double()
    full = tdecomp.Ratio(1.0, of="rank")
    for methods in (("lowrank", "svd"), ("tucker2", "svd")):
        result = decompose(model, methods, full, allow_expansion=True)
        with torch.no_grad():
            torch.testing.assert_close(result.model(x), model(x), rtol=1e-9, atol=1e-9)


def test_decompose_is_plan_and_apply():
    case = MODELS["cnn"]
    model, x = case.build(), case.inputs()
    plan = tdecomp.plan(model, METHODS, rank=0.5, example_inputs=x)
    applied = tdecomp.apply(model, plan, progress=False)
    decomposed = decompose(model, rank=0.5, example_inputs=x)
    assert applied.plan.rows == plan.rows
    # What comes of it is in the report, so that nothing need be foreseen.
    assert decomposed.plan.rows == tuple(replace(row, expected_error=None) for row in plan)
    with torch.no_grad():
        assert torch.equal(decomposed.model.eval()(x), applied.model.eval()(x))


def test_every_option_of_plan_is_one_of_decompose():
    import inspect

    of_plan = inspect.signature(tdecomp.plan).parameters
    of_decompose = inspect.signature(tdecomp.decompose).parameters
    for name, parameter in of_plan.items():
        assert of_decompose[name].default == parameter.default
        assert of_decompose[name].kind == parameter.kind
    wide = tdecomp.at_least(channels=24)
    result = decompose(
        MODELS["cnn"].build(),
        where=lambda module, name: name != "features.0" and wide(module, name),
        include="features",
        exclude="features.3",
        allow_expansion=True,
        rank=23,
        example_inputs=MODELS["cnn"].inputs(),
        methods=("lowrank", "svd"),
    )
    assert [row.name for row in result.report if row.method] == ["features.6"]
    assert result.report["features.6"].macs_before is not None
    assert (
        decompose(MODELS["cnn"].build(), where=tdecomp.at_least(features=11)).report["head"].method
        is None
    )


# Kept --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "copy"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_device_and_dtype(dtype, inplace):
    model = MODELS["cnn"].build().to(dtype)
    result = decompose(model, inplace=inplace)
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert {p.device.type for p in result.model.parameters()} == {"cpu"}


@pytest.mark.parametrize("method", CONV_METHODS)
def test_memory_format(method):
    model = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 12, 3))
    x = torch.randn(2, 8, 6, 6)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        result = decompose(model.to(memory_format=memory_format), method)
        weights = [p for p in result.model.parameters() if p.dim() == 4]
        assert all(w.is_contiguous(memory_format=memory_format) for w in weights)
        y = result.model(x.contiguous(memory_format=memory_format))
        assert y.is_contiguous(memory_format=memory_format)


def test_memory_format_in_three_dimensions():
    model = nn.Sequential(nn.Conv3d(8, 12, 3)).to(memory_format=torch.channels_last_3d)
    for weight in decompose(model, "tucker2").model.parameters():
        assert weight.dim() < 5 or weight.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "copy"])
def test_training_mode_is_each_layers_own(inplace):
    model = MODELS["cnn"].build()
    model.features[3].eval()
    modes = {name: m.training for name, m in model.named_modules()}
    result = decompose(model, inplace=inplace)
    assert {n: result.model.get_submodule(n).training for n in modes} == modes
    assert not result.model.features[3][0].training
    assert result.model.features[0][0].training


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_requires_grad_is_each_parameters_own(weight, bias):
    model = MODELS["cnn"].build()
    model.head.weight.requires_grad_(weight)
    model.head.bias.requires_grad_(bias)
    chain = decompose(model).model.head
    assert [layer.weight.requires_grad for layer in chain] == [weight, weight]
    assert chain[-1].bias.requires_grad == bias
    assert chain[0].bias is None


def test_the_bias_is_kept_bit_for_bit_and_none_is_added():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16, bias=False))
    result = decompose(model).model
    assert torch.equal(result[0][-1].bias, model[0].bias)
    assert [layer.bias for layer in result[1]] == [None, None]


def test_layers_that_are_left_alone_are_copied_bit_for_bit():
    model = MODELS["cnn"].build()
    result = decompose(model, "svd").model
    for name, parameter in model.named_parameters():
        if name.startswith(("head", "features.6")):
            continue
        copied = result.get_parameter(name)
        assert copied is not parameter
        assert torch.equal(copied, parameter)


def test_the_new_weights_are_leaves_without_history():
    model = MODELS["cnn"].build()
    for parameter in decompose(model).model.parameters():
        assert parameter.is_leaf
        assert parameter.grad is None


def test_a_model_in_a_no_grad_or_inference_block():
    with torch.no_grad():
        result = decompose(MODELS["cnn"].build())
    assert all(p.requires_grad for p in result.model.parameters())


def test_attributes_and_hooks_of_the_model_are_copied():
    model = MODELS["cnn"].build()
    model.classes = ["a", "b"]
    model.register_forward_hook(lambda _, __, output: output * 0)
    result = decompose(model).model
    assert result.classes == ["a", "b"]
    assert result(MODELS["cnn"].inputs()).abs().sum() == 0


def test_graph_modules():
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)))
    x = torch.randn(2, 16)
    for inplace in (False, True):
        result = decompose(model, "svd", example_inputs=x, inplace=inplace)
        assert [row.method for row in result.report] == ["svd", "svd"]
        assert result.model(x).shape == (2, 16)


# Nothing global changes --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["svd", *CONV_METHODS])
def test_no_global_state_changes(method):
    model = MODELS["conv"].build() if method != "svd" else nn.Linear(16, 16)
    backend = tensorly.get_backend()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    settings = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    decompose(model, method, rank=20 if method.startswith("cp") else 2, allow_expansion=True)
    assert tensorly.get_backend() == backend == "numpy"
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002
    assert settings == (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())


@pytest.mark.parametrize("method", CONV_METHODS)
def test_the_result_does_not_depend_on_the_global_seed(method):
    model = MODELS["conv"].build()
    results = []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            rank = 14 if method.startswith("cp") else 4
            results.append(decompose(model, method, rank=rank, allow_expansion=True).model)
    for first, second in zip(results[0].parameters(), results[1].parameters(), strict=True):
        assert torch.equal(first, second)


# Side by side ------------------------------------------------------------------------------------


def wide():
    """Layers of more than 100,000 entries, which are fitted side by side."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(160, 320, 3), nn.Flatten(), nn.Linear(320, 320), nn.Linear(320, 330)
    )


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("rank", [2, "vbmf", tdecomp.Budget(params=0.6)], ids=str)
def test_layers_side_by_side_are_those_one_by_one(rank):
    methods = METHODS if rank == 2 else ("lowrank", "tucker2", "svd")
    results = [decompose(wide(), methods, rank) for _ in range(2)]
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    results.append(decompose(wide(), methods, rank))
    for result in results[1:]:
        assert [row.name for row in result.report] == [row.name for row in results[0].report]
        assert [row.rank for row in result.plan] == [row.rank for row in results[0].plan]
        for one, other in zip(
            result.model.parameters(), results[0].model.parameters(), strict=True
        ):
            torch.testing.assert_close(one, other)
    for one, other in zip(
        results[1].model.parameters(), results[0].model.parameters(), strict=True
    ):
        assert torch.equal(one, other)


class FailsOn(tdecomp.SVD):
    """Fails on one kernel."""

    name = "fails"
    kernel = None

    def fit(self, kernel, rank):
        scale = self.kernel.abs().max()
        if kernel.shape == self.kernel.shape and torch.equal(kernel, self.kernel / scale):
            raise RuntimeError("no")
        return super().fit(kernel, rank)


@pytest.mark.usefixtures("two_threads")
def test_a_fit_that_fails_beside_others_names_its_layer():
    model = wide()
    names = [row.name for row in decompose(model, tdecomp.SVD()).report if row.method]
    method = FailsOn()
    object.__setattr__(method, "kernel", model.get_submodule(names[1]).weight.detach())
    with unchanged(model), pytest.raises(ValueError, match=f"layer '{names[1]}'.*RuntimeError: no"):
        decompose(model, method)


# The bar -----------------------------------------------------------------------------------------


def test_the_bar_can_be_switched_off(capfd):
    decompose(MODELS["nested"].build(), progress=False)
    assert capfd.readouterr() == ("", "")


def test_the_bar_counts_the_layers(capfd):
    decompose(MODELS["nested"].build(), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "fit:" in err
    assert "4/4 layers" in err
    assert "error at most 0." in err


def test_the_bar_is_on_by_default(capfd):
    model = MODELS["nested"].build()
    tdecomp.apply(model, tdecomp.plan(model, METHODS, rank=2))
    assert "4/4" in capfd.readouterr().err


# Errors ------------------------------------------------------------------------------------------


class Broken(tdecomp.SVD):
    """A user's method that fails in a way of its choice."""

    name = "broken"

    def __init__(self, what):
        object.__setattr__(self, "what", what)

    def fit(self, kernel, rank):
        factors = super().fit(kernel, rank)
        if self.what == "error":
            raise torch.linalg.LinAlgError("did not converge")
        return factors.scaled(float("nan"))


@pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "copy"])
@pytest.mark.parametrize(
    "what, message",
    [("error", "LinAlgError: did not converge"), ("nan", "the factors are not finite")],
)
def test_a_fit_that_fails_names_the_layer_and_the_way_out(what, message, inplace):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 12))
    with unchanged(model), pytest.raises(ValueError, match="layer '0'") as caught:
        decompose(model, Broken(what), inplace=inplace)
    text = str(caught.value)
    assert "Linear(16→16)" in text
    assert "broken at rank 2" in text
    assert message in text
    assert "exclude=['0']" in text


def test_a_fit_that_fails_keeps_its_cause():
    with pytest.raises(ValueError, match="layer ''") as caught:
        decompose(nn.Linear(16, 16), Broken("error"))
    assert isinstance(caught.value.__cause__, torch.linalg.LinAlgError)


def test_an_interrupt_passes_through(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tdecomp.SVD, "fit", interrupt)
    model = nn.Sequential(nn.Linear(16, 16))
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        decompose(model, inplace=True)


BAD = {
    "rank 0": ({"rank": 0}, "rank"),
    "rank NaN": ({"rank": float("nan")}, "rank"),
    "rank 1.0": ({"rank": 1.0}, "rank"),
    "rank too large": ({"rank": 999}, "'stem.0'"),
    "a pair": ({"rank": (2, 2)}, "'stem.0'"),
    "unknown method": ({"methods": "nope"}, "nope"),
    "unknown selector": ({"rank": "nope"}, "nope"),
    "include": ({"include": "nope"}, "nope"),
    "exclude": ({"exclude": "nope"}, "nope"),
    "inputs": ({"example_inputs": torch.zeros(1, 2)}, "example_inputs"),
    "cp and vbmf": ({"methods": "cp", "rank": "vbmf"}, "'stem.0'"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "copy"])
def test_bad_input_leaves_the_model_and_the_optimizer_as_they_were(kind, inplace):
    options, word = BAD[kind]
    model = MODELS["nested"].build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if inplace:
        options = {**options, "optimizers": optimizer}
    with unchanged(model, optimizer), pytest.raises(ValueError, match=word):
        decompose(model, inplace=inplace, **options)


def test_a_model_where_nothing_is_to_be_done_is_copied():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    result = decompose(model, "lowrank", example_inputs=torch.zeros(1, 4, 5, 5))
    assert result.report["0"].method is None
    assert type(result.model[0]) is nn.Conv2d
    assert result.model is not model


def test_decomposing_again_finds_chains_and_leaves_them():
    model = MODELS["nested"].build()
    once = decompose(model, include="stem").model
    twice = decompose(once)
    assert twice.report["stem.0.0"].reason.startswith("part of a chain that 'lowrank' made")
    assert twice.report["heads.a"].method == "svd"
    assert isinstance(twice.model.stem[0], Chain)
    assert twice.model.stem[0].rank == 2


def test_apply_finds_the_fits_of_a_plan_with_the_same_moments():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(6, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3))
        images = torch.randn(20, 6, 9, 9)
    moments = tdecomp.calibrate(model, [images], progress=False)
    plan = tdecomp.plan(model, "dense", rank=tdecomp.Budget(params=0.5), data=moments)
    reports = [tdecomp.apply(model, plan, data=moments).report for _ in range(2)]
    chosen = [row for row in plan if row.method is not None]
    assert chosen
    for planned in chosen:
        first, second = (report[planned.name] for report in reports)
        assert first.fit_seconds == second.fit_seconds  # of the one fit that was made
        assert first.output_error == planned.expected_error
