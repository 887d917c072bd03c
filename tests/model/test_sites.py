"""Which layers are found, and the reason of each one that is left alone."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import tdecomp
from tdecomp.model.filters import Filters, at_least, matches
from tdecomp.model.opened.scope import opened
from tdecomp.model.sites import find_sites
from tests.models import METHODS, MODELS
from tests.unchanged import unchanged


def sites_of(model, example_inputs=None, **filters):
    return find_sites(model, Filters(**filters), example_inputs)


def quietly(make):
    """Old torch functions warn that they are old."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


# Found -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_and_convolution_is_a_site_once(name):
    model = MODELS[name].build()
    expected = {m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))}
    found = find_sites(model)
    layers = [site.module for site in found.values() if site.spec is not None]
    assert len(layers) == len(expected)
    assert set(layers) == expected
    assert all(found[name].name == name for name in found)


def test_a_module_with_two_names_is_one_site():
    site = sites_of(MODELS["twice"].build())["first"]
    assert site.names == ("first", "again")


def test_the_model_itself_has_the_empty_name():
    assert list(sites_of(nn.Linear(3, 4))) == [""]
    assert sites_of(nn.Linear(3, 4))[""].names == ("",)


def test_names_are_in_the_order_of_the_model():
    model = MODELS["nested"].build()
    assert list(sites_of(model)) == ["stem.0", "stem.1", "heads.a", "heads.b.1"]


# Left alone --------------------------------------------------------------------------------------


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class OwnCall(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) * 2


class OwnCallImpl(nn.Linear):
    def _call_impl(self, x):
        return super()._call_impl(x) * 2


class OwnConvForward(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


class OwnInit(nn.Linear):
    def __init__(self):
        super().__init__(16, 16)


def linear():
    return nn.Linear(16, 16)


def patched():
    layer = linear()
    layer.forward = lambda x: x
    return layer


def hooked(register, *arguments, **options):
    def make():
        layer = linear()
        getattr(layer, register)(*arguments, **options)
        return layer

    return make


def parametrized():
    layer = linear()
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    return layer


def quantized_dynamic():
    model = nn.Sequential(linear())
    return quietly(lambda: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}))[0]


def identity(*_):
    return None


LEFT_ALONE = {
    "parametrized": (parametrized, "remove_parametrizations"),
    "weight_norm": (lambda: parametrizations.weight_norm(linear()), "remove_parametrizations"),
    "old weight_norm": (
        lambda: quietly(lambda: nn.utils.weight_norm(linear())),
        "remove_weight_norm",
    ),
    "spectral_norm": (lambda: parametrizations.spectral_norm(linear()), "remove_parametrizations"),
    "old spectral_norm": (
        lambda: quietly(lambda: nn.utils.spectral_norm(linear())),
        "remove_spectral_norm",
    ),
    "pruned": (lambda: prune.l1_unstructured(linear(), "weight", 0.5), "prune.remove"),
    "lazy linear": (lambda: nn.LazyLinear(16), "run the model once"),
    "lazy conv": (lambda: nn.LazyConv2d(16, 3), "run the model once"),
    "quantized": (quantized_dynamic, "quantized"),
    "own forward": (lambda: OwnForward(16, 16), "OwnForward overrides forward"),
    "own call": (lambda: OwnCall(16, 16), "OwnCall overrides __call__"),
    "own call, inside": (lambda: OwnCallImpl(16, 16), "OwnCallImpl overrides _call_impl"),
    "own conv forward": (
        lambda: OwnConvForward(16, 16, 3),
        "OwnConvForward overrides _conv_forward",
    ),
    "patched forward": (patched, "Linear overrides forward"),
    "forward hook": (hooked("register_forward_hook", identity), "hooks of its own"),
    "forward pre-hook": (hooked("register_forward_pre_hook", identity), "hooks of its own"),
    "backward hook": (hooked("register_full_backward_hook", identity), "hooks of its own"),
    "backward pre-hook": (hooked("register_full_backward_pre_hook", identity), "hooks of its own"),
}


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_a_layer_that_cannot_be_replaced_is_left_alone_with_the_reason(kind):
    make, reason = LEFT_ALONE[kind]
    layer = make()
    model = nn.Sequential(layer, linear())
    with unchanged(model):
        found = tdecomp.plan(model, METHODS, rank=2)
    assert found["0"].method is None
    assert reason in found["0"].reason
    assert found["1"].method == "svd"
    result = tdecomp.decompose(model, METHODS, rank=2, inplace=True, progress=False)
    assert result.report["0"].reason == found["0"].reason
    assert model[0] is layer
    assert result.report["1"].method == "svd"


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_a_model_with_such_a_layer_can_be_copied(kind):
    make, _ = LEFT_ALONE[kind]
    model = nn.Sequential(make(), linear())
    with unchanged(model):
        result = tdecomp.decompose(model, METHODS, rank=2, progress=False)
    assert type(result.model[0]) is type(model[0])
    assert result.model[0] is not model[0]
    assert result.report["1"].method == "svd"


@pytest.mark.parametrize("kind", [k for k in LEFT_ALONE if "lazy" not in k and "conv" not in k])
def test_it_is_left_alone_with_example_inputs_too(kind):
    make, reason = LEFT_ALONE[kind]
    model = nn.Sequential(make(), linear())
    found = tdecomp.plan(model, METHODS, rank=2, example_inputs=torch.randn(2, 16))
    assert reason in found["0"].reason
    assert found["1"].method == "svd"


def test_a_layer_that_became_ordinary_again_is_taken():
    layer = parametrizations.weight_norm(linear())
    parametrize.remove_parametrizations(layer, "weight")
    assert sites_of(layer)[""].reason is None
    layer = prune.l1_unstructured(linear(), "weight", 0.5)
    assert sites_of(prune.remove(layer, "weight"))[""].reason is None
    layer = linear()
    handle = layer.register_forward_hook(identity)
    handle.remove()
    assert sites_of(layer)[""].reason is None
    lazy = nn.LazyLinear(16)
    lazy(torch.randn(2, 8))
    assert sites_of(lazy)[""].reason is None


def test_a_subclass_with_torchs_forward_is_taken():
    assert sites_of(OwnInit())[""].reason is None


def test_lazy_layers_with_example_inputs_stay_lazy():
    model = nn.Sequential(nn.LazyLinear(16), linear())
    plan = tdecomp.plan(model, "svd", rank=2, example_inputs=torch.randn(2, 8))
    assert "lazy" in plan["0"].reason
    assert type(model[0]) is nn.LazyLinear


class OwnConvolution(nn.modules.conv._ConvNd):
    def __init__(self):
        ones = (1,)
        super().__init__(8, 8, (3,), ones, ones, ones, False, (0,), 1, True, "zeros")

    def forward(self, x):
        return nn.functional.conv1d(x, self.weight, self.bias, padding=1)


def test_a_convolution_that_is_none_of_torchs_is_left_alone():
    model = nn.Sequential(OwnConvolution(), nn.Conv1d(8, 8, 3))
    plan = tdecomp.plan(model, "lowrank", rank=2)
    assert plan["0"].reason is not None
    assert plan["1"].method == "lowrank"


@pytest.mark.parametrize(
    "register",
    [
        "register_state_dict_pre_hook",
        "register_state_dict_post_hook",
        "register_load_state_dict_pre_hook",
        "register_load_state_dict_post_hook",
    ],
)
def test_hooks_on_the_state_dict_are_hooks_too(register):
    assert "hooks of its own" in sites_of(hooked(register, identity)())[""].reason


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_the_weight_are_hooks_too(register):
    layer = linear()
    getattr(layer.weight, register)(lambda _: None)
    assert sites_of(layer)[""].reason is not None


# Weights that others read ------------------------------------------------------------------------


def test_attention_reads_its_projections_itself():
    model = MODELS["attention"].build()
    for x in (None, MODELS["attention"].inputs()):
        found = sites_of(model, x)
        assert found["attention.out_proj"].reason == "MultiheadAttention reads its weight itself"
        assert found["embed"].reason is None
        assert found["head"].reason is None


def test_attention_that_is_not_open_reads_its_out_projection_itself():
    model = MODELS["encoder"].build()
    closed = "MultiheadAttention reads its weight itself"
    for x in (None, MODELS["encoder"].inputs()):
        assert sites_of(model, x)["0.layers.0.self_attn.out_proj"].reason == closed
        with opened(model):
            assert all(site.reason is None for site in sites_of(model, x).values())


def test_swins_projections_are_known_by_their_class():
    class ShiftedWindowAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    found = sites_of(ShiftedWindowAttention())
    assert found["qkv"].reason == found["proj"].reason
    assert found["qkv"].reason == "shifted-window attention reads its weight itself"


def test_tied_weights_name_each_other():
    model = nn.Sequential(nn.Embedding(16, 16), linear(), linear(), linear())
    model[1].weight = model[0].weight
    model[3].bias = model[2].bias
    found = sites_of(model)
    assert found["1"].reason == "its weight is tied: '0', '1' share it"
    assert "'2', '3'" in found["2"].reason
    assert "'2', '3'" in found["3"].reason


def test_a_view_of_another_weight_is_tied():
    model = nn.Sequential(linear(), linear(), linear())
    model[1].weight = nn.Parameter(model[0].weight.detach())
    assert "tied" in sites_of(model)["1"].reason
    assert sites_of(model)["2"].reason is None


def test_a_layer_that_is_used_twice_is_not_tied():
    assert sites_of(MODELS["twice"].build())["first"].reason is None


def test_tied_layers_keep_their_tie_in_the_copy():
    model = nn.Sequential(linear(), linear(), linear())
    model[1].weight = model[0].weight
    result = tdecomp.decompose(model, "svd", rank=2, progress=False)
    assert result.model[0].weight is result.model[1].weight
    assert result.model[0].weight is not model[0].weight


def test_everything_else_is_never_negative():
    model = nn.Sequential(linear(), linear(), linear())
    model[1].weight = model[0].weight
    plan = tdecomp.plan(model, "svd", rank=2)
    assert plan.before.params == sum(p.numel() for p in model.parameters())
    assert plan.everything_else.params >= 0


def test_an_earlier_chain_is_left_alone():
    first = tdecomp.decompose(
        nn.Sequential(linear(), linear()), "svd", rank=3, include="0", progress=False
    )
    found = sites_of(first.model)
    assert list(found) == ["0.0", "0.1", "1"]
    assert found["0.0"].reason == "part of a chain that 'svd' made before"
    assert found["1"].reason is None
    assert sites_of(copy.deepcopy(first.model))["0.1"].reason is not None


# Wrapped models ----------------------------------------------------------------------------------


def distributed():
    # A real one needs a process group; its class is what is looked at.
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = linear()
    return wrapper


class MyDataParallel(nn.DataParallel):
    pass


WRAPPED = {
    "DataParallel": (lambda: nn.DataParallel(linear()), "model.module"),
    "DistributedDataParallel": (distributed, "model.module"),
    "compiled": (
        lambda: quietly(lambda: torch.compile(nn.Sequential(linear()))),
        "model._orig_mod",
    ),
    "scripted": (
        lambda: quietly(lambda: torch.jit.script(nn.Sequential(linear()))),
        "decompose the eager model",
    ),
    "traced": (
        lambda: quietly(lambda: torch.jit.trace(linear(), torch.randn(1, 16))),
        "decompose the eager model",
    ),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapped_model_is_refused_with_the_remedy(kind):
    make, remedy = WRAPPED[kind]
    model = make()
    for call in (tdecomp.plan, tdecomp.decompose):
        with pytest.raises(ValueError, match="the model is") as caught:
            call(model, "svd", rank=2)
        assert remedy in str(caught.value)


def test_a_subclass_of_a_wrapper_is_one():
    with pytest.raises(ValueError, match="decompose the inner module"):
        tdecomp.plan(MyDataParallel(linear()), "svd", rank=2)


def test_a_plan_is_not_applied_to_a_wrapped_model():
    plan = tdecomp.plan(linear(), "svd", rank=2)
    with pytest.raises(ValueError, match="decompose the inner module"):
        tdecomp.apply(nn.DataParallel(linear()), plan, progress=False)


def test_no_module_and_no_layers():
    with pytest.raises(TypeError, match=r"expected an nn\.Module, got int"):
        tdecomp.plan(3, "svd", rank=2)
    with pytest.raises(ValueError, match=r"the model \(Sequential\) has no Linear or convolution"):
        tdecomp.plan(nn.Sequential(nn.ReLU(), nn.Embedding(3, 4)), "svd", rank=2)


# Filters -----------------------------------------------------------------------------------------


def taken(**options):
    plan = tdecomp.plan(MODELS["cnn"].build(), ("lowrank", "svd"), rank=1, **options)
    return [row.name for row in plan if row.method is not None]


EVERY = ["features.0", "features.3", "features.4", "features.6", "features.7", "head"]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, EVERY),
        ({"include": "head"}, ["head"]),
        ({"include": ["features.0", "head"]}, ["features.0", "head"]),
        ({"include": "features"}, EVERY[:-1]),
        ({"include": "features.[03]"}, ["features.0", "features.3"]),
        ({"include": "*d"}, ["head"]),
        ({"exclude": "features"}, ["head"]),
        ({"exclude": ["features.?"]}, ["head"]),
        ({"include": "features", "exclude": ["features.0"]}, EVERY[1:-1]),
        ({"where": lambda module, _: isinstance(module, nn.Linear)}, ["head"]),
        ({"where": lambda _, name: name.endswith("3")}, ["features.3"]),
        ({"where": at_least(channels=4)}, EVERY[1:]),
        ({"where": at_least(channels=24)}, ["features.4", "features.6", "head"]),
        ({"where": at_least(features=11)}, EVERY[:-1]),
        ({"where": at_least(features=10)}, EVERY),
        ({"where": at_least(24, 11)}, ["features.4", "features.6"]),
    ],
)
def test_filters(options, expected):
    assert taken(**options) == expected


def test_filters_give_their_reason():
    model = MODELS["cnn"].build()
    wide = at_least(features=12)
    plan = tdecomp.plan(
        model, ("lowrank", "svd"), rank=1, include="*", exclude="features.3", where=wide
    )
    assert plan["features.3"].reason == "excluded by 'features.3'"
    assert plan["head"].reason == (
        "narrower than where=at_least(channels=0, features=12): its narrower side has 10"
    )
    plan = tdecomp.plan(model, ("lowrank", "svd"), rank=1, include="head")
    assert plan["features.3"].reason == "not in include"
    plan = tdecomp.plan(model, ("lowrank", "svd"), rank=1, where=lambda *_: False)
    assert plan["features.3"].reason == "not wanted by where"


@pytest.mark.parametrize("empty", ["", [], {}, 0, (), False, "features"])
def test_a_where_that_cannot_be_called_is_refused(empty):
    model = MODELS["cnn"].build()
    for call in (tdecomp.plan, tdecomp.decompose):
        with pytest.raises(TypeError, match=r"where: expected a callable .*at_least") as caught:
            call(model, "svd", rank=2, where=empty)
        assert f"got {empty!r}" in str(caught.value)


def test_at_least_looks_at_both_sides_and_can_be_pickled():
    wide = pickle.loads(pickle.dumps(at_least(channels=8, features=16)))
    assert wide == at_least(8, 16)
    layers = {
        (nn.Conv2d(8, 9, 1)): True,
        (nn.Conv2d(8, 7, 1)): False,
        (nn.ConvTranspose1d(7, 9, 1)): False,
        (nn.Linear(16, 16)): True,
        (nn.Linear(16, 15)): False,
        (nn.ReLU()): False,
    }
    assert {layer: wide(layer, "any") for layer in layers} == layers


@pytest.mark.parametrize("width", [-1, 1.5, "16", None, True])
def test_at_least_takes_whole_numbers(width):
    for option in ("channels", "features"):
        with pytest.raises(ValueError, match=rf"expected {option} to be a whole number"):
            at_least(**{option: width})


# With filters and example inputs ----------------------------------------------------------------


def test_filters_and_example_inputs_together():
    case = MODELS["attention"]
    model, x = case.build(), case.inputs()
    filters = Filters(exclude=("head",), where=lambda _, name: name != "embed")
    plain, both = find_sites(model), find_sites(model, filters, x)
    assert both.trace.total_macs == find_sites(model, example=x).trace.total_macs > 0
    assert both["head"].reason == "excluded by 'head'"
    assert both["embed"].calls
    assert plain.trace is None
    assert plain["head"].reason is None
    assert plain["head"].calls is None


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(option):
    model = MODELS["cnn"].build()
    with unchanged(model), pytest.raises(ValueError, match=option) as caught:
        tdecomp.decompose(model, "svd", rank=2, **{option: ["head", "feature.3"]}, inplace=True)
    assert "'feature.3' matches no Linear or convolution" in str(caught.value)
    assert "'features.3'" in str(caught.value)  # what may have been meant


def test_any_name_of_a_shared_module_is_its_name():
    plan = tdecomp.plan(MODELS["twice"].build(), "svd", rank=2, include="again")
    assert plan["first"].method == "svd"
    plan = tdecomp.plan(MODELS["twice"].build(), "svd", rank=2, exclude="again")
    assert plan["first"].method is None


def test_what_a_pattern_matches():
    assert matches("a.b", "a")
    assert matches("a.b", "a.b")
    assert matches("a.b", "a.*")
    assert not matches("ab", "a")
    assert not matches("a.B", "a.b")
    assert matches("", "*")
