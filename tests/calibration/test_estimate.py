"""Errors on held-out samples: their value, their interval, and what is more than chance."""

import math

import pytest
import torch

from tdecomp.calibration.estimate import helps, lost_share, paired_gain


def drawn(count, generator, spread=0.5):
    """What samples lose of their power, which varies from sample to sample."""
    power = (spread * torch.randn(count, generator=generator)).exp().double()
    share = 0.3 + 0.1 * torch.rand(count, generator=generator).double()
    return share * power, power


def test_it_is_the_ratio_of_the_sums_with_the_jackknife_s_error():
    lost, power = drawn(20, torch.Generator().manual_seed(0))
    found = lost_share(lost, power)
    assert found.value == pytest.approx(float(lost.sum() / power.sum()))
    left_out = (lost.sum() - lost) / (power.sum() - power)
    jackknife = 19 / 20 * (left_out - left_out.mean()).square().sum()
    assert found.se == pytest.approx(float(jackknife.sqrt()), rel=0.02)
    assert found.margin > 2 * found.se


@pytest.mark.parametrize("count", [3, 5, 12, 50])
def test_the_interval_holds_the_truth(count):
    generator = torch.Generator().manual_seed(0)
    lost, power = drawn(10**6, generator)
    truth, held = float(lost.sum() / power.sum()), 0
    for _ in range(400):
        found = lost_share(*drawn(count, generator))
        held += abs(found.value - truth) <= found.margin
    assert held / 400 > 0.92


def test_a_single_sample_has_no_error_of_its_own():
    found = lost_share(torch.tensor([1.0]), torch.tensor([4.0]))
    assert (found.value, found.se, found.margin) == (0.25, None, None)
    alone = lost_share(torch.tensor([1.0, 0.0]), torch.tensor([4.0, 0.0]))
    assert (alone.value, alone.se) == (0.25, None)


@pytest.mark.parametrize("lost, share", [(0.0, 0.0), (1.0, 1.0)])
def test_outputs_that_never_vary(lost, share):
    assert lost_share(torch.tensor([lost, 0.0]), torch.zeros(2)).value == share


def test_a_gain_is_judged_sample_by_sample():
    power = torch.tensor([1.0, 10.0, 100.0, 3.0]).double()
    gain, se = paired_gain(power, power - 0.1)
    assert gain == pytest.approx(0.4)
    assert se < 1e-4
    assert helps(power, power - 0.1, held_out=True)
    assert not helps(power - 0.1, power, held_out=True)
    assert not helps(power, power, held_out=True)
    assert not helps(power, torch.tensor([1.0, 20.0, 80.0, 3.0]), held_out=True)
    assert not helps(power[:1], power[:1] - 1, held_out=True)  # one sample says nothing
    assert helps(power[:1], power[:1] - 1, held_out=False)
    assert not helps(power, power, held_out=False)
    assert paired_gain(power[:1], power[:1])[1] == math.inf
