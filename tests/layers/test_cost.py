"""Costs of chains against torch's flop counter over the chain itself."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tdecomp.decomposers.assemble import empty_chain
from tdecomp.decomposers.registry import get_decomposer
from tdecomp.layers.cost import Cost, chain_cost
from tdecomp.layers.geometry import Call
from tdecomp.layers.spec import LayerSpec
from tests.geometries import DEPTHWISE, GEOMETRIES

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


TAKEN = [
    pytest.param(method, geometry, id=f"{method}-{geometry}")
    for method in ("svd", "lowrank", "tucker2", "cp", "cp-separable")
    for geometry in GEOMETRIES + DEPTHWISE
    if get_decomposer(method).refusal(geometry.spec) is None
]


@pytest.mark.parametrize("method, geometry", TAKEN)
def test_a_chain_costs_what_torch_counts(method, geometry):
    spec, decomposer = geometry.spec, get_decomposer(method)
    largest = decomposer.max_rank(spec)
    rank = tuple(-(-r // 2) for r in largest) if isinstance(largest, tuple) else -(-largest // 2)
    cpu = torch.device("cpu")
    chain = empty_chain(decomposer, spec, rank, cpu, torch.float64)
    x = geometry.input(2)
    with FlopCounterMode(display=False) as counter:
        chain(x)

    cost = chain_cost(decomposer.stages(spec, rank), [spec.call(x.shape)])

    assert cost.macs == counter.get_total_flops() // 2
    assert cost.params == sum(p.numel() for p in chain.parameters())


def test_calls_add_up_and_none_is_unknown():
    spec = LayerSpec.of(nn.Linear(3, 4))
    assert chain_cost([spec], [Call(2), Call(5)]) == Cost(16, 7 * 12)
    assert chain_cost([spec], []) == Cost(16, 0)
    assert chain_cost([spec], None) == Cost(16, None)


def test_costs_add_and_subtract_and_stay_unknown_where_one_is():
    assert Cost(3, 10) + Cost(4, 20) == Cost(7, 30)
    assert Cost(3, 10) - Cost(1, 4) == Cost(2, 6)
    assert Cost(3, 10) + Cost(4) == Cost(7)
    assert Cost(3) - Cost(4, 1) == Cost(-1)


def test_macs_decide_where_there_are_any():
    assert (Cost(3, 10).amount, Cost(3, 10).unit) == (10, "MACs")
    assert (Cost(3, 0).amount, Cost(3, 0).unit) == (3, "parameters")
    assert (Cost(3).amount, Cost(3).unit) == (3, "parameters")
