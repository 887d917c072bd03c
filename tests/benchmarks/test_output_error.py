import copy

import pytest
import torch
from torch import nn

import tdecomp
from benchmarks.support.output_error import output_errors


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


def test_it_agrees_with_what_the_fits_say_of_the_same_batches(model):
    batches = [torch.randn(6, 3, 8, 8) + 1 for _ in range(4)]
    result = tdecomp.decompose(
        model, ["lowrank", "svd"], rank=3, data=tdecomp.Data(batches, held_out=0),
        progress=False, allow_expansion=True,
    )  # fmt: skip
    errors = output_errors(model, result.model, ["0", "3"], batches)
    for name, error in errors.items():
        assert error > 1e-3
        assert error == pytest.approx(result.report[name].output_error, rel=1e-4)


def test_equal_layers_lose_nothing_and_hooks_are_gone(model):
    same = copy.deepcopy(model)
    assert output_errors(model, same, ["0", "3"], [torch.randn(2, 3, 8, 8)]) == {"0": 0, "3": 0}
    assert not model[0]._forward_hooks
    assert output_errors(model, model, [], [torch.randn(2, 3, 8, 8)]) == {}
