"""The module of a tensor train: its order of contraction, its cost, its inputs."""

import json
import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import tensorly
import torch
from tensorly.tt_matrix import tt_matrix_to_matrix
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tdecomp.layers.geometry import Call
from tdecomp.layers.stage import id_of
from tdecomp.layers.tensor_train import TTStage, cheapest_contraction
from tests.decomposers.oracle import distance


@pytest.mark.parametrize("seed", range(20))
def test_the_contraction_is_the_cheapest_and_gives_what_the_matrix_gives(seed):
    draw = np.random.default_rng(seed)
    count = int(draw.integers(2, 5))
    out, into, ranks = (
        tuple(draw.integers(1, 5, size=n).tolist()) for n in (count, count, count - 1)
    )
    stage = TTStage(out, into, ranks, bias=True)
    module = stage.build(dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(seed))
    x = torch.randn(3, stage.in_channels, generator=torch.Generator().manual_seed(1)).double()
    with tensorly.backend_context("pytorch"):
        matrix = tt_matrix_to_matrix(list(module.cores))
    with FlopCounterMode(display=False) as counter:
        y = module(x)
    assert distance(y, nn.functional.linear(x, matrix, module.bias)) < 1e-12
    assert counter.get_total_flops() // 2 == stage.macs(Call(3))
    costs = [_macs_in_order(order, out, into, ranks) for order in permutations(range(count))]
    assert cheapest_contraction(out, into, ranks).macs == min(costs)


def _macs_in_order(order, out, into, ranks):
    """By the sizes of the tensor before each step, counted apart from the library's own way."""
    bonds, total = (1, *ranks, 1), 0
    done = set()
    for k in order:
        outputs = math.prod(out[j] for j in done)
        inputs = math.prod(into[j] for j in range(len(into)) if j not in done)
        # A rank is open where one of its two cores is done; the step's own core uses two of them.
        cut = {j + side for j in done for side in (0, 1)}
        open_ranks = [j for j in cut if ((j - 1) in done) != (j in done) and j not in (k, k + 1)]
        rest = math.prod(bonds[j] for j in open_ranks)
        total += outputs * inputs * rest * bonds[k] * out[k] * bonds[k + 1]
        done.add(k)
    return total


def test_inputs_of_any_number_of_dimensions_and_none_at_all():
    stage = TTStage((3, 2), (2, 4), (2,), bias=True)
    module = stage.build()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.5)
    for shape in ((8,), (0, 8), (2, 3, 8), (2, 1, 3, 8)):
        assert module(torch.zeros(shape)).shape == (*shape[:-1], 6)
    transposed = torch.arange(48.0).reshape(8, 6).T
    torch.testing.assert_close(module(transposed), module(transposed.contiguous()))


def test_in_autocast_it_returns_what_a_linear_layer_does():
    stage = TTStage((3, 2), (2, 4), (2,), bias=True)
    module, linear, x = stage.build(), nn.Linear(8, 6), torch.ones(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == linear(x).dtype == torch.bfloat16


def test_stages_are_told_apart_in_a_profile():
    stage = TTStage((3, 2), (2, 4), (2,), bias=True)
    assert id_of(stage) == id_of(replace(stage)) != id_of(replace(stage, bias=False))
    assert json.loads(id_of(stage))["in_shape"] == [2, 4]
