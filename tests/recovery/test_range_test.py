"""The rate that a few steps with a rising rate find."""

from functools import partial

import pytest
import torch
from torch import nn

from tdecomp.recovery.adam import Coordinates
from tdecomp.recovery.range_test import range_test

CPU = torch.device("cpu")


def found(distance, batches=12):
    """The rate for a weight that is so far from where all batches want it."""
    torch.manual_seed(0)
    wanted = torch.randn(16, 16)
    weight = nn.Parameter(wanted + distance * torch.randn(16, 16))
    before = weight.detach().clone()
    coordinates = Coordinates([weight], {})
    losses = [partial(lambda x: (x @ (weight - wanted)).square().mean(), torch.randn(8, 16))]
    rate = range_test(coordinates, losses * batches, CPU)
    assert torch.equal(weight, before)
    coordinates.write()
    torch.testing.assert_close(weight.detach(), before)
    return rate


def test_the_nearer_the_weights_are_the_smaller_is_the_rate():
    rates = [found(distance) for distance in (0.001, 0.01, 0.1)]
    assert rates[0] < rates[1] < rates[2]


@pytest.mark.parametrize("batches", [1, 2, 100])
def test_any_number_of_batches_will_do(batches):
    assert 0 < found(0.1, batches) < 0.1


def test_a_loss_without_gradients_or_one_that_is_not_a_number_ends_it():
    weight = nn.Parameter(torch.ones(4))
    for loss in (torch.tensor(1.0), torch.tensor(float("nan"))):
        assert range_test(Coordinates([weight], {}), [lambda loss=loss: loss], CPU) > 0
        assert torch.equal(weight, torch.ones(4))
