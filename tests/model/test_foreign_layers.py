"""Layers whose weights are not plain tensors, or that belong to something around them."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import tdecomp

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
QUIET = {"progress": False}


def net():
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


class Packed(torch.Tensor):
    """A weight without a storage, as quantizers make them."""

    kept = (torch.ops.aten.detach.default, torch.ops.aten.clone.default)

    @staticmethod
    def __new__(cls, values):
        made = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        del types
        plain = torch.utils._pytree.tree_map(lambda x: x.values if isinstance(x, cls) else x, args)
        out = func(*plain, **(kwargs or {}))
        return cls(out) if func in cls.kept else out


class Uncopied(Packed):
    """One that cannot be deep-copied."""

    kept = (torch.ops.aten.detach.default,)


def only_the_last(model, reason, **options):
    report = tdecomp.decompose(model, "svd", rank=4, **options, **QUIET).report
    assert report["2"].method == "svd"
    assert reason in report["0"].reason
    return report


@pytest.mark.parametrize("kind", [Packed, Uncopied])
@pytest.mark.parametrize("options", [{}, {"example_inputs": X}, {"example_inputs": X, "data": [X]}])
def test_a_quantized_weight_stops_its_own_layer_only(options, kind):
    model = net()
    model[0].weight = nn.Parameter(kind(model[0].weight.detach()), requires_grad=False)
    assert torch.isfinite(model(X)).all()
    only_the_last(model, f"its weight is a {kind.__name__}: decompose plain tensors", **options)


class Held(nn.Linear):
    """As a package's own layer."""


Held.__module__ = "bitsandbytes.nn.modules"


def test_layers_of_packages_that_quantize_are_left_alone():
    model = net()
    model[0] = Held(16, 16)
    only_the_last(model, "quantized: decompose first")


def test_an_empty_weight_is_left_alone():
    model = net()
    model[0].weight.data = torch.empty(0)
    only_the_last(model, "its weight is empty, as where it is sharded")


def test_a_layer_that_was_given_a_weight_of_another_size_is_left_alone():
    model = net()
    model[0] = nn.Linear(16, 8)
    model[0].weight, model[0].bias = nn.Parameter(torch.ones(16, 16)), nn.Parameter(torch.ones(16))
    only_the_last(model, "its weight is of shape (16, 16), by its attributes of (8, 16)")


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_and_traced_parts_are_left_as_they_are(inplace):
    for compiled in (torch.jit.script(net()), torch.jit.trace(net(), X)):
        model = nn.Sequential(compiled, nn.Linear(16, 16)).eval()
        result = tdecomp.decompose(
            model, "svd", rank=2, example_inputs=X, data=[X], inplace=inplace, **QUIET
        )
        reasons = [row.reason for row in result.report]
        assert reasons[2] is None
        assert all("no layer of a known kind" in reason for reason in reasons[:2])
        assert all(row.macs_before == 8 * 16 * 16 for row in result.report)
        result.model(X)


class Adapter(nn.Module):
    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(16, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 16, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class OwnAdapter(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.original = layer
        self.lora_down, self.lora_up = nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)

    def forward(self, x):
        return self.original(x) + self.lora_up(self.lora_down(x))


@pytest.mark.parametrize(
    "adapter, parts",
    [
        (Adapter, ("base_layer", "lora_A.default", "lora_B.default")),
        (OwnAdapter, ("original", "lora_down", "lora_up")),
    ],
)
def test_adapters_are_left_whole(adapter, parts):
    model = net()
    model[0] = adapter(model[0])
    report = tdecomp.decompose(model, "svd", rank=2, example_inputs=X, **QUIET).report
    assert all("merge it first" in report[f"0.{name}"].reason for name in parts)
    assert report["2"].method == "svd"


class Hook:
    """As accelerate's: it brings the weight for the time of a call."""

    def __init__(self, layer):
        self.weight, layer._hf_hook, inner = layer.weight, self, layer.forward
        layer.weight = nn.Parameter(layer.weight.detach().to("meta"))

        def forward(x):
            layer.weight, away = self.weight, layer.weight
            try:
                return inner(x)
            finally:
                layer.weight = away

        layer.forward = forward


def test_offloaded_layers_are_left_alone_with_the_right_remedy():
    model = net()
    Hook(model[0])
    for options in ({}, {"example_inputs": X}):
        report = tdecomp.plan(model, "svd", rank=4, **options, **QUIET)
        assert "remove_hook_from_module" in report["0"].reason
        assert report["2"].method == "svd"


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("after_a_call", [False, True])
def test_sharded_models_are_refused(mesh, after_a_call):
    for shard in (
        lambda model: fully_shard(model, mesh=mesh),
        lambda model: parallelize_module(model, mesh, {"0": ColwiseParallel()}),
    ):
        model = net()
        shard(model)
        if after_a_call:
            model(X)
        with pytest.raises(ValueError, match=r"sharded.*before it is sharded"):
            tdecomp.decompose(model, "svd", rank=4, **QUIET)
