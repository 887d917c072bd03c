"""Kinds of layers of a user's own: registered from outside, then decomposed like torch's."""

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.decomposers.registry import get_decomposer
from tdecomp.layers.spec import KINDS, LayerSpec, kind_of

QUIET = {"progress": False}
EVEN_IF_LARGER = {"allow_expansion": True, "progress": False}


class Turned(nn.Module):
    """A Linear that stores its weight as (in, out)."""

    def __init__(self, into, out, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(into, out) / into**0.5)
        self.bias = nn.Parameter(torch.randn(out)) if bias else None

    def forward(self, x):
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class TurnedKind(tdecomp.LayerKind):
    name = "Turned"

    def base_class(self, module):
        return Turned if isinstance(module, Turned) else None

    def spec_of(self, module):
        return LayerSpec(*module.weight.shape, bias=module.bias is not None)

    def build(self, spec, device, dtype):
        return Turned(spec.in_channels, spec.out_channels, spec.bias).to(device, dtype)

    def to_forward_layout(self, weight, spec):  # noqa: ARG002
        return weight.T

    def from_forward_layout(self, kernel, spec):  # noqa: ARG002
        return kernel.T


class ConvHWIO(nn.Module):
    """A convolution that stores its weight as (height, width, in / groups, out)."""

    def __init__(self, spec):
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.randn(*spec.kernel_size, spec.group_in, spec.out_channels))
        self.bias = nn.Parameter(torch.randn(spec.out_channels))

    def forward(self, x):
        weight, spec = self.weight.permute(3, 2, 0, 1), self.spec
        return nn.functional.conv2d(
            x, weight, self.bias, spec.stride, spec.padding, spec.dilation, spec.groups
        )


class HWIOKind(tdecomp.LayerKind):
    name = "ConvHWIO"

    def base_class(self, module):
        return ConvHWIO if isinstance(module, ConvHWIO) else None

    def spec_of(self, module):
        return module.spec

    def build(self, spec, device, dtype):
        return ConvHWIO(spec).to(device, dtype)

    def to_forward_layout(self, weight, spec):  # noqa: ARG002
        return weight.permute(3, 2, 0, 1)

    def from_forward_layout(self, kernel, spec):  # noqa: ARG002
        return kernel.permute(2, 3, 1, 0)


@pytest.fixture(autouse=True)
def kinds():
    """Both kinds are known during a test and forgotten after it."""
    before = dict(KINDS)
    tdecomp.register_layer_kind(TurnedKind())
    tdecomp.register_layer_kind(HWIOKind())
    yield
    KINDS.clear()
    KINDS.update(before)


def linears(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(Turned(12, 10), nn.Tanh(), Turned(10, 6, bias=False)).to(dtype).eval()


def convolutions(dtype=torch.float64):
    torch.manual_seed(0)
    first = LayerSpec.of(nn.Conv2d(4, 8, 3, stride=2, padding=1))
    second = LayerSpec.of(nn.Conv2d(8, 6, (3, 2), groups=2))
    return nn.Sequential(ConvHWIO(first), nn.Tanh(), ConvHWIO(second)).to(dtype).eval()


MODELS = {
    "Turned": (linears, (5, 3, 12), "svd"),
    "ConvHWIO": (convolutions, (5, 4, 9, 9), "lowrank"),
}
each_kind = pytest.mark.parametrize("kind", MODELS)


def model_and_input(kind):
    build, shape, method = MODELS[kind]
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return build(), x, method


def gradient_at(model, x):
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    return x.grad


def at_full_rank(model, method, **options):
    largest = get_decomposer(method).max_rank
    ranks = {name: largest(LayerSpec.of(model[int(name)])) for name in ("0", "2")}
    return tdecomp.decompose(model, method, rank=ranks, allow_expansion=True, **QUIET, **options)


EXACT = [("Turned", "svd"), *(("ConvHWIO", m) for m in ("lowrank", "spatial", "tucker2"))]


@pytest.mark.parametrize("kind, method", EXACT)
def test_at_full_rank_a_chain_equals_the_layer_forward_and_backward(kind, method):
    model, x, _ = model_and_input(kind)
    result = at_full_rank(model, method)
    assert all(type(part).__module__.startswith("torch.") for part in result.model[0])
    assert all(row.weight_error < 1e-12 for row in result.report)
    torch.testing.assert_close(result.model(x), model(x))
    torch.testing.assert_close(gradient_at(result.model, x), gradient_at(model, x))


@pytest.mark.parametrize("method", ["cp", "cp-separable"])
def test_cp_takes_such_a_convolution(method):
    model, x, _ = model_and_input("ConvHWIO")
    result = tdecomp.decompose(model, method, rank=12, allow_expansion=True, **QUIET)
    assert all(row.weight_error < 0.5 for row in result.report)
    assert result.model(x).shape == model(x).shape


@each_kind
def test_rows_plans_and_files(kind, tmp_path):
    model, x, method = model_and_input(kind)
    plan = tdecomp.plan(model, method, rank=2, example_inputs=x)
    again = tdecomp.Plan.from_json(plan.to_json())
    assert again["0"].layer == plan["0"].layer == LayerSpec.of(model[0])
    assert plan["0"].layer.kind == kind
    assert f"{kind}(" in str(plan)
    assert plan["0"].macs_before == LayerSpec.of(model[0]).macs(plan["0"].calls[0]) > 0
    result = tdecomp.apply(model, again, **QUIET)
    result.save(tmp_path / "model.safetensors")
    loaded = tdecomp.load(tmp_path / "model.safetensors", MODELS[kind][0]())
    assert torch.equal(loaded(x), result.model(x))
    assert torch.equal(copy.deepcopy(loaded)(x), loaded(x))


@each_kind
def test_fits_to_data_and_recovery(kind):
    model, x, method = model_and_input(kind)
    batches = tdecomp.Data([x, x.flip(0)], augment=None, held_out=0)
    result = tdecomp.decompose(model, method, rank=2, data=batches, **EVEN_IF_LARGER)
    with torch.no_grad():
        wanted = model[0](x)
        outputs = wanted.movedim(1, -1) if kind == "ConvHWIO" else wanted
        variance = (outputs.flatten(0, -2) - outputs.flatten(0, -2).mean(0)).square().sum()
        lost = (result.model[0](x) - wanted).square().sum()
    assert float(lost / variance) == pytest.approx(result.report["0"].output_error, rel=1e-6)
    by_weight = tdecomp.decompose(model, method, rank=2, **EVEN_IF_LARGER).model
    assert lost < (by_weight[0](x) - wanted).square().sum()
    recovery = tdecomp.refit(result.model, model, batches, **QUIET)
    assert set(recovery.layers) == {"0", "2"}
    assert recovery.error_after < recovery.error_before


@each_kind
def test_a_budget_with_data_finds_such_layers(kind):
    model, x, method = model_and_input(kind)
    plan = tdecomp.plan(
        model, method, rank=tdecomp.Budget(params=0.7), example_inputs=x, data=[x], **QUIET
    )
    assert plan.after.params <= 0.7 * plan.before.params


@each_kind
def test_ranks_are_reduced_by_way_of_the_layer(kind):
    model, x, method = model_and_input(kind)
    first = at_full_rank(model, method)
    direct = tdecomp.decompose(model, method, rank=2, **EVEN_IF_LARGER)
    second = tdecomp.reduce_ranks(first, rank=2, **QUIET)
    torch.testing.assert_close(second.model(x), direct.model(x))


@each_kind
def test_such_layers_are_timed(kind, tmp_path):
    build, shape, method = MODELS[kind]
    model, x = build(torch.float32), torch.zeros(shape)
    times = tdecomp.profile(model, x, method, effort="quick", **QUIET)
    times.save(tmp_path / "times.json")
    assert tdecomp.Profile.load(tmp_path / "times.json") == times
    assert f"{kind}(" in str(times)


# What a kind says of its layers ------------------------------------------------------------------


@each_kind
def test_a_built_layer_is_like_the_original(kind):
    model, _, _ = model_and_input(kind)
    for layer in (model[0], model[2]):
        spec = LayerSpec.of(layer)
        built = spec.build(torch.device("cpu"), torch.float64)
        assert type(built) is type(layer)
        assert LayerSpec.of(built) == spec
        assert spec.weight_shape == tuple(layer.weight.shape)
        assert spec.params == sum(p.numel() for p in layer.parameters())
        spec.put(built, spec.read(layer))
        assert torch.equal(built.weight, layer.weight)


def test_a_spec_is_plain_data_with_its_kind():
    spec = LayerSpec.of(Turned(4, 3))
    assert str(spec) == "Turned(4→3)"
    assert LayerSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert spec != LayerSpec.of(nn.Linear(4, 3))
    assert spec.like() == LayerSpec.of(nn.Linear(4, 3))
    assert len({spec, replace(spec), spec.like(), LayerSpec(4, 3)}) == 2
    assert spec.pointwise(4, 2).kind == spec.along((), 4, 2).kind == "Linear"


def test_plain_data_without_a_kind_is_a_layer_of_torch():
    data = LayerSpec.of(nn.ConvTranspose2d(4, 3, 2)).to_dict()
    assert data.pop("kind") == "ConvTranspose2d"
    assert LayerSpec.from_dict(data) == LayerSpec.of(nn.ConvTranspose2d(4, 3, 2))


def test_a_spec_of_an_unknown_kind_can_be_shown_but_not_built():
    spec = LayerSpec(4, 3, kind="Unheard")
    assert str(spec) == "Unheard(4→3)"
    assert spec.params == 15
    with pytest.raises(ValueError, match=r"Unheard\(4→3\): .*tdecomp.register_layer_kind"):
        spec.build()


def test_a_layer_of_no_known_kind_is_a_row_that_says_so():
    model = nn.Sequential(Turned(8, 8), nn.Linear(8, 8))
    assert all(row.method == "svd" for row in tdecomp.plan(model, "svd", rank=2))
    del KINDS["Turned"]
    row = tdecomp.plan(model, "svd", rank=2)["0"]
    assert (row.method, row.reason) == (None, "no layer of a known kind: Turned(8×8)")
    with pytest.raises(ValueError, match=r"no Linear or convolution .*register_layer_kind"):
        tdecomp.plan(model[0], "svd", rank=2)


class OwnForward(Turned):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnInit(Turned):
    def __init__(self):
        super().__init__(8, 8)


def hooked():
    layer = Turned(8, 8)
    layer.register_forward_hook(lambda *_: None)
    return layer


def with_a_buffer():
    layer = Turned(8, 8)
    layer.register_buffer("scale", torch.ones(8))
    return layer


@pytest.mark.parametrize(
    "make, reason",
    [
        (OwnInit, None),
        (lambda: OwnForward(8, 8), "OwnForward overrides forward"),
        (hooked, "hooks of its own"),
        (with_a_buffer, "more than a weight and a bias: scale"),
    ],
)
def test_the_reasons_of_torchs_layers_hold_for_such_layers_too(make, reason):
    found = tdecomp.plan(nn.Sequential(make(), Turned(8, 8)), "svd", rank=2)
    assert found["1"].method == "svd"
    assert found["0"].reason is None if reason is None else reason in found["0"].reason


class Doubled(nn.Linear):
    """A Linear whose forward is its own, but still computes a product with its weight."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def test_a_kind_of_ones_own_comes_before_torchs():
    class DoubledKind(tdecomp.LayerKind):
        name = "Doubled"

        def base_class(self, module):
            return Doubled if isinstance(module, Doubled) else None

        def spec_of(self, module):
            return LayerSpec(module.in_features, module.out_features)

        def build(self, spec, device, dtype):
            return Doubled(spec.in_channels, spec.out_channels, device=device, dtype=dtype)

    assert "overrides forward" in tdecomp.plan(Doubled(8, 8), "svd", rank=2)[""].reason
    kind = tdecomp.register_layer_kind(DoubledKind())
    assert kind_of(Doubled(8, 8)) is kind
    assert kind_of(nn.Linear(8, 8)).name == "Linear"
    assert tdecomp.plan(Doubled(8, 8), "svd", rank=2)[""].method == "svd"


def test_at_least_counts_a_layer_without_spatial_dimensions_as_a_linear():
    assert tdecomp.at_least(features=8)(Turned(8, 8), "")
    assert not tdecomp.at_least(features=8)(Turned(8, 7), "")
    assert not tdecomp.at_least(channels=5)(convolutions()[0], "")


# Registering -------------------------------------------------------------------------------------


def test_a_kind_can_be_registered_again_but_not_take_anothers_name():
    again = tdecomp.register_layer_kind(TurnedKind())
    assert kind_of(Turned(2, 2)) is again

    class Other(TurnedKind):
        name = "Linear"

    with pytest.raises(ValueError, match="'Linear' is the name of Linear already"):
        tdecomp.register_layer_kind(Other())


@pytest.mark.parametrize(
    "kind, words", [(TurnedKind, "the class TurnedKind"), (nn.Linear(2, 2), "Linear"), (3, "int")]
)
def test_what_is_no_kind_is_refused(kind, words):
    with pytest.raises(TypeError, match=f"expected an instance of LayerKind, got {words}"):
        tdecomp.register_layer_kind(kind)


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_kind_needs_a_name(name):
    kind = TurnedKind()
    kind.name = name
    with pytest.raises(ValueError, match="TurnedKind needs a name"):
        tdecomp.register_layer_kind(kind)
