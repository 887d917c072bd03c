import pytest
import torch
from torch import nn

from tests.timing.clock import install


@pytest.fixture
def clock(monkeypatch):
    return install(monkeypatch)


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
