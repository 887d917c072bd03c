"""The VBMF selector on layers; the estimate itself is tested in test_evb.py."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import tdecomp
from tdecomp import VBMF
from tdecomp.linalg.evb import evb_rank


def planted(shape, rank, noise=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(shape[0], rank, generator=generator)
    right = torch.randn(rank, math.prod(shape[1:]), generator=generator)
    weight = left @ right + noise * torch.randn(shape[0], right.shape[1], generator=generator)
    return weight.reshape(shape)


def with_weight(layer, weight):
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def estimate(matrix):
    return evb_rank(np.linalg.svd(matrix, compute_uv=False) ** 2, matrix.shape).rank


def row_of(layer, method, rank="vbmf"):
    return tdecomp.plan(layer, method, rank=rank, allow_expansion=True)[""]


def test_a_planted_rank_is_found_in_a_linear():
    layer = with_weight(nn.Linear(80, 60), planted((60, 80), 7))
    row = row_of(layer, "svd")
    assert row.rank == 7
    assert row.note is None


def test_lowrank_looks_at_the_kernel_as_a_matrix():
    layer = with_weight(nn.Conv2d(16, 48, 3), planted((48, 16, 3, 3), 5))
    assert row_of(layer, "lowrank").rank == 5


def test_tucker_looks_at_both_channel_unfoldings():
    generator = torch.Generator().manual_seed(0)
    core = torch.randn(6, 4, 3, 3, generator=generator)
    out = torch.randn(40, 6, generator=generator)
    into = torch.randn(30, 4, generator=generator)
    weight = torch.einsum("ar,bs,rsij->abij", out, into, core)
    weight += 0.05 * torch.randn(weight.shape, generator=generator)
    assert row_of(with_weight(nn.Conv2d(30, 40, 3), weight), "tucker2").rank == (4, 6)
    transposed = with_weight(nn.ConvTranspose2d(30, 40, 3), weight.transpose(0, 1))
    assert row_of(transposed, "tucker2").rank == (4, 6)


def test_groups_take_the_largest_estimate():
    weight = torch.cat([planted((32, 8, 3, 3), 3, seed=1), planted((32, 8, 3, 3), 6, seed=2)])
    layer = with_weight(nn.Conv2d(16, 64, 3, groups=2), weight)
    expected = [estimate(part.flatten(1).double().numpy()) for part in weight.chunk(2)]
    assert expected == [3, 6]
    assert row_of(layer, "lowrank").rank == 6


def test_rank_zero_becomes_one_and_the_row_says_so():
    generator = torch.Generator().manual_seed(0)
    layer = with_weight(nn.Linear(60, 60), torch.randn(60, 60, generator=generator))
    assert estimate(layer.weight.detach().double().numpy()) == 0
    row = row_of(layer, "svd")
    assert row.rank == 1
    assert "the VBMF estimate was 0" in row.note
    conv = with_weight(nn.Conv2d(20, 30, 3), torch.randn(30, 20, 3, 3, generator=generator))
    row = row_of(conv, "tucker2")
    assert row.rank == (1, 1)
    assert "the VBMF estimate was (0, 0)" in row.note


def test_a_zero_kernel_has_rank_one():
    layer = with_weight(nn.Linear(20, 20), torch.zeros(20, 20))
    assert row_of(layer, "svd").rank == 1


def test_weaken_goes_from_the_estimate_to_the_full_rank():
    layer = with_weight(nn.Linear(80, 60), planted((60, 80), 7))
    ranks = [row_of(layer, "svd", VBMF(weaken=w)).rank for w in (0.0, 0.25, 0.5, 0.75, 1.0)]
    # MUSCO: the reduction from the full rank, 60 - 7, is weakened and truncated.
    assert ranks == [60 - int((1 - w) * 53) for w in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert (ranks[0], ranks[-1]) == (7, 60)


def test_weaken_weakens_both_ranks_of_tucker():
    generator = torch.Generator().manual_seed(0)
    conv = with_weight(nn.Conv2d(20, 30, 3), torch.randn(30, 20, 3, 3, generator=generator))
    assert row_of(conv, "tucker2", VBMF(weaken=0.5)).rank == (10, 15)
    assert row_of(conv, "tucker2", VBMF(weaken=1.0)).rank == (20, 30)


def test_the_default_is_the_estimate():
    assert VBMF() == VBMF(weaken=0.0)


@pytest.mark.parametrize("weaken", [-0.1, 1.1, math.nan, True])
def test_weaken_out_of_range(weaken):
    with pytest.raises(ValueError, match="VBMF: expected weaken from 0 to 1, got"):
        VBMF(weaken=weaken)
