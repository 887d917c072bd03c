"""Optimizers know the parameters of closed modules; in place they go on with those of open ones."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import tdecomp
from tdecomp.layers.grouped_linear import GroupedLinear
from tdecomp.model.opened.experts import OpenExperts

SIZE = 16
QUIET = {"progress": False}


class Cross(nn.Module):
    """Attention whose keys are not its queries: its one weight is opened in three parts."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(SIZE, 4, batch_first=True)

    def forward(self, x, y):
        return self.attention(x, y, y)[0]


def trained(model, *inputs):
    optimizer = torch.optim.Adam(model.named_parameters(), lr=0.01)
    step(model, optimizer, *inputs)
    return optimizer


def step(model, optimizer, *inputs):
    optimizer.zero_grad()
    model(*inputs).square().sum().backward()
    optimizer.step()


def held(optimizer):
    """The optimizer's parameters by the names that it has for them."""
    return {
        name: p
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }


@pytest.mark.parametrize("which", ["attention.q_proj_weight", "attention.out_proj"])
def test_the_parts_of_a_weight_take_its_place(which):
    torch.manual_seed(0)
    model, inputs = Cross(), (torch.randn(2, 5, SIZE), torch.randn(2, 7, SIZE))
    optimizer = trained(model, *inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that no optimizer had it
        tdecomp.decompose(
            model, "svd", rank=3, include=which, example_inputs=inputs, inplace=True,
            optimizers=optimizer, **QUIET,
        )  # fmt: skip
    now = dict(model.named_parameters())
    assert {name: id(p) for name, p in held(optimizer).items()} == {
        name: id(p) for name, p in now.items()
    }
    assert {id(p) for p in optimizer.state} <= {id(p) for p in now.values()}
    before = copy.deepcopy(model.state_dict())
    step(model, optimizer, *inputs)
    moved = {name for name, value in model.state_dict().items() if (value != before[name]).any()}
    assert {name for name in now if "k_proj_weight.bias" not in name} <= moved  # no gradient there


def test_an_open_weight_that_is_the_same_parameter_keeps_its_state():
    model = nn.TransformerEncoderLayer(SIZE, 4, 32, batch_first=True)
    optimizer = trained(model, torch.randn(2, 5, SIZE))
    weight = model.self_attn.in_proj_weight
    tdecomp.decompose(
        model, "svd", rank=3, include="*out_proj", inplace=True, optimizers=optimizer, **QUIET
    )
    names = {id(p): name for name, p in held(optimizer).items()}
    assert names[id(weight)] == "self_attn.in_proj_weight.weight"
    assert weight in optimizer.state


class Transposed(nn.Module):
    """Experts as of GPT-OSS, whose weights are (experts, in, out)."""

    def __init__(self):
        super().__init__()
        self.num_experts = 3
        self.has_gate = self.has_bias = self.is_transposed = self.is_concatenated = True
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 32))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(3, 32))
        self.down_proj = nn.Parameter(torch.randn(3, 16, 8))
        self.down_proj_bias = nn.Parameter(torch.randn(3, 8))

    def _apply_gate(self, x):
        gate, up = x.chunk(2, dim=-1)
        return gate.sigmoid() * up


def test_transposed_experts_are_trained_on():
    model = nn.Sequential(Transposed())
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    tdecomp.decompose(
        model, "svd", rank=2, include="*down_proj", inplace=True, optimizers=optimizer, **QUIET
    )
    assert isinstance(model[0], OpenExperts)
    assert isinstance(model[0].gate_up_proj, GroupedLinear)
    assert {id(p) for p in held(optimizer).values()} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("name", ["in_proj_weight", "in_proj_bias"])
def test_attention_that_computes_a_weight_stays_closed(name):
    model = Cross()
    prune.l1_unstructured(model.attention, name, 0.5)
    model.extra = nn.Linear(SIZE, SIZE)
    plan = tdecomp.plan(model, "svd", rank=3, **QUIET)
    assert [row.name for row in plan if row.method] == ["extra"]
    assert all(row.reason for row in plan if not row.method)
