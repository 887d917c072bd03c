"""Energy against numpy's singular values."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import tdecomp
from tdecomp import Energy


def smallest(matrix, share):
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    return next(r for r in range(1, len(squares) + 1) if squares[:r].sum() >= share * squares.sum())


def weight(layer):
    return layer.weight.detach().double().numpy()


def rank_of(layer, method, share):
    return tdecomp.plan(layer, method, rank=Energy(share), allow_expansion=True)[""].rank


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.99])
def test_the_smallest_rank_that_keeps_the_share(share):
    torch.manual_seed(0)
    linear, conv = nn.Linear(30, 20), nn.Conv2d(6, 12, 3)
    kernel = weight(conv)
    assert rank_of(linear, "svd", share) == smallest(weight(linear), share)
    assert rank_of(conv, "lowrank", share) == smallest(kernel.reshape(12, -1), share)
    into, out = kernel.transpose(1, 0, 2, 3).reshape(6, -1), kernel.reshape(12, -1)
    assert rank_of(conv, "tucker2", share) == (smallest(into, share), smallest(out, share))


def test_the_channels_of_a_transposed_layer_are_not_mixed_up():
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(6, 12, 3)
    kernel = weight(layer)  # (in, out, 3, 3)
    into, out = kernel.reshape(6, -1), kernel.transpose(1, 0, 2, 3).reshape(12, -1)
    assert rank_of(layer, "tucker2", 0.8) == (smallest(into, 0.8), smallest(out, 0.8))


def test_groups_are_taken_together():
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 12, 3, groups=2)
    with torch.no_grad():
        layer.weight[6:] *= 3
    first, second = (weight(layer)[i : i + 6].reshape(6, -1) for i in (0, 6))
    squares = sum(np.linalg.svd(m, compute_uv=False) ** 2 for m in (first, second))
    expected = next(r for r in range(1, 7) if squares[:r].sum() >= 0.7 * squares.sum())
    assert rank_of(layer, "lowrank", 0.7) == expected


def test_a_planted_rank_is_all_the_energy():
    torch.manual_seed(0)
    layer = nn.Linear(20, 20)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(20, 3) @ torch.randn(3, 20))
    assert rank_of(layer, "svd", 0.999999) == 3
    assert 1 <= rank_of(layer, "svd", 1.0) <= 20


def test_a_zero_kernel_has_rank_one():
    layer = nn.Linear(20, 20)
    nn.init.zeros_(layer.weight)
    assert rank_of(layer, "svd", 0.9) == 1


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale):
    torch.manual_seed(0)
    layer = nn.Linear(20, 20)
    before = rank_of(layer, "svd", 0.9)
    with torch.no_grad():
        layer.weight.mul_(scale)
    assert rank_of(layer, "svd", 0.9) == before


@pytest.mark.parametrize("share", [0, -1, 1.0001, math.nan, True])
def test_a_share_out_of_range(share):
    with pytest.raises(ValueError, match="expected a share above 0 and at most 1, got"):
        Energy(share)


@pytest.mark.parametrize("method", ["cp", "cp-separable"])
@pytest.mark.parametrize("rank", [Energy(0.9), "vbmf"], ids=["Energy", "VBMF"])
def test_cp_has_no_spectrum_and_the_error_lists_what_applies(method, rank):
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match=f"layer '0'.*'{method}'") as caught:
        tdecomp.plan(model, method, rank=rank)
    message = str(caught.value)
    for selector in ("an int", "of='rank'", "of='params'", "of='macs'", "'breakeven'"):
        assert selector in message
    assert "vbmf" not in message.split("Selectors")[1]


def test_spectra_are_only_computed_when_asked_for():
    class WithoutSpectrum(tdecomp.SVD):
        def unfoldings(self, kernel):
            del kernel
            raise AssertionError("no selector asked for it")

    tdecomp.plan(nn.Linear(20, 20), WithoutSpectrum(), rank=4)
    with pytest.raises(AssertionError, match="no selector"):
        tdecomp.plan(nn.Linear(20, 20), WithoutSpectrum(), rank=Energy(0.5))
