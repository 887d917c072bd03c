"""Several Linear layers in one against these layers, one by one."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tdecomp
from tdecomp.layers.geometry import Call
from tdecomp.layers.grouped_linear import GroupedChain, GroupedLinear
from tdecomp.layers.spec import LayerSpec
from tdecomp.model.macs import MacCounter

# The second has no rows, and the last row has no group.
ENDS = torch.tensor([3, 3, 8, 10], dtype=torch.int32)
FULL = {"rank": tdecomp.Ratio(1.0, of="rank"), "allow_expansion": True, "progress": False}


def layer(into=8, out=12, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    made = GroupedLinear(4, into, out, bias=bias, dtype=dtype)
    if bias:
        torch.nn.init.normal_(made.bias)
    return made


def one_by_one(layer, x):
    firsts = [0, *ENDS.tolist()]
    parts = [
        torch.nn.functional.linear(x[a:b], w, None if layer.bias is None else layer.bias[i])
        for i, (a, b, w) in enumerate(zip(firsts, firsts[1:], layer.weight, strict=False))
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(8, 12), (8, 16), (5, 3)])  # aligned and not
@pytest.mark.parametrize("bias", [False, True])
def test_each_row_meets_its_own_layer(sizes, bias, dtype):
    module = layer(*sizes, bias, dtype)
    x = torch.randn(11, sizes[0], dtype=dtype)
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype.itemsize < 4 else {}
    torch.testing.assert_close(module(x, ENDS)[:10], one_by_one(module, x), **tolerance)


@pytest.mark.parametrize("sizes", [(8, 16), (5, 3)])
def test_gradients_are_those_of_the_layers(sizes):
    module = layer(*sizes)
    x = torch.randn(11, sizes[0], requires_grad=True)
    weights = torch.randn(10, sizes[1])
    gradients = []
    for y in (module(x, ENDS)[:10], one_by_one(module, x)):
        leaves = (x, module.weight, module.bias)
        of_x, *others = torch.autograd.grad((y * weights).sum(), leaves)
        gradients.append((of_x[:10], *others))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("sizes", [(8, 16), (5, 3)])
def test_macs_are_those_that_are_done(sizes):
    module, x = layer(*sizes, bias=False), torch.randn(10, sizes[0])
    with MacCounter() as counter, torch.no_grad():
        module(x, ENDS)
    spec = LayerSpec.of(module)
    assert counter.macs == spec.macs(Call(10)) == 10 * sizes[0] * sizes[1]
    assert spec.params == 4 * sizes[0] * sizes[1]


def test_the_chain_at_full_rank_is_the_layer():
    module, x = layer(), torch.randn(10, 8)
    result = tdecomp.decompose(module, "svd", example_inputs=(x, ENDS), **FULL)
    assert isinstance(result.model, GroupedChain)
    torch.testing.assert_close(result.model(x, ENDS), module(x, ENDS), rtol=1e-4, atol=1e-5)
    row = result.report[""]
    with MacCounter() as counter, torch.no_grad():
        result.model(x, ENDS)
    assert row.macs_after == counter.macs


def test_the_chain_at_a_lower_rank_is_that_of_each_layer():
    module = layer(bias=False)
    result = tdecomp.decompose(module, "svd", rank=3, progress=False)
    first, second = (stage.weight for stage in result.model)
    for i, weight in enumerate(module.weight):
        u, s, vh = torch.linalg.svd(weight.detach(), full_matrices=False)
        best = (u[:, :3] * s[:3]) @ vh[:3]
        torch.testing.assert_close((second[i] @ first[i]).detach(), best, rtol=1e-4, atol=1e-5)


def test_without_ends_all_groups_have_as_many_rows():
    module, x = layer(), torch.randn(8, 8)
    torch.testing.assert_close(module(x), module(x, torch.tensor([2, 4, 6, 8])))
    profile = tdecomp.profile(module, (x,), "svd", effort="quick", progress=False)
    assert profile.times


@pytest.mark.parametrize("sizes", [(8, 16), (5, 3)])
def test_it_is_exported(sizes):
    module, x = layer(*sizes), torch.randn(11, sizes[0])
    exported = torch.export.export(module, (x, ENDS)).module()
    torch.testing.assert_close(exported(x, ENDS)[:10], module(x, ENDS)[:10])
    with FlopCounterMode(display=False):
        exported(x, ENDS)


def test_a_name_that_fused_layers_have_gives_it_no_parts():
    model = torch.nn.ModuleDict({"gate_up_proj": layer()})
    plan = tdecomp.plan(model, "auto", rank=tdecomp.Budget(params=0.7), progress=False)
    assert plan["gate_up_proj"].method == "svd"
    assert tdecomp.SplitSVD(parts=2).refusal(LayerSpec.of(layer()))
