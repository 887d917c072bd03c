import pytest
import torch
from torch import nn

import tdecomp
from benchmarks.layer_kinds import kind_in_words, rows_of


@pytest.mark.parametrize(
    "layer, words",
    [
        (nn.Linear(4, 300), "Linear"),
        (nn.Conv2d(3, 64, 3), "3×3, first layer"),
        (nn.Conv2d(64, 10, 1), "1×1, narrow"),
        (nn.Conv2d(16, 32, 3), "3×3, 16 to 63 channels"),
        (nn.Conv2d(256, 128, (1, 7)), "1×7, 128 and more channels"),
    ],
)
def test_a_kind_is_a_kernel_and_a_width(layer, words):
    assert kind_in_words(tdecomp.LayerSpec.of(layer)) == words


def test_each_method_has_a_row_of_medians_over_the_layers_that_it_takes():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(64, 12)
    )
    data = tdecomp.Data([torch.randn(64, 16, 6, 6)], augment=None)
    rows = {
        (kind, method): (number, *errors)
        for _, kind, number, method, *errors in rows_of("net", model, data)
    }
    number, *errors = rows["3×3, 16 to 63 channels", "lowrank"]
    assert number == "2"
    assert 0 < float(errors[0]) < float(errors[1]) < float(errors[2]) < 1
    assert ("Linear", "svd") in rows
    assert ("Linear", "lowrank") not in rows
