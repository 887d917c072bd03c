import pytest
import torch
from torch import nn

from tdecomp.decomposers.registry import listed_methods
from tdecomp.model.example import Example
from tdecomp.model.sites import find_sites
from tdecomp.timing.measure import measure
from tests.timing.fake_stopwatch import FakeStopwatch


@pytest.fixture
def stopwatch():
    return FakeStopwatch()


@pytest.fixture
def profiled(stopwatch):
    """Takes a profile with the fake stopwatch, which all that is timed with it will use, too."""

    def take(model, x, methods="dense", **options):
        example = Example.of(x)
        sites = list(find_sites(model, None, example).values())
        return measure(
            model, example, sites, listed_methods(methods), stopwatch=stopwatch, **options
        )

    return take


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    ).eval()


@pytest.fixture
def x():
    return torch.zeros(2, 3, 12, 12)
