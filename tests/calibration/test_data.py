"""Data as the user describes it."""

import pytest
import torch
from torch import nn

from tdecomp import Data, Moments

ONE = torch.ones(2, 3)


@pytest.mark.parametrize("data", [None, 3, "abc", nn.Identity(), Data([ONE])], ids=type)
def test_what_is_no_batches_is_refused(data):
    with pytest.raises(TypeError, match=f"data: expected batches.*got {type(data).__name__}"):
        Data(data)


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, "1G"])
@pytest.mark.parametrize("name", ["max_batches", "max_memory"])
def test_a_limit_that_cannot_be(name, limit):
    with pytest.raises(ValueError, match=f"data: expected {name} to be a whole number.*{limit}"):
        Data([ONE], **{name: limit})


@pytest.mark.parametrize("name", ["mask", "augment"])
def test_what_cannot_be_called(name):
    with pytest.raises(TypeError, match=f"a callable {name}\\(batch.*got {name}=3"):
        Data([ONE], **{name: 3})


def test_moments_are_not_wrapped():
    with pytest.raises(TypeError, match="expected data=moments without Data around them"):
        Data(Moments({}))
