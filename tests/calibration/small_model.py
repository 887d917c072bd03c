"""A small model, batches for it, and the moments that they give."""

from dataclasses import dataclass

import torch
from torch import nn

import tdecomp
from tdecomp.calibration.calibrate import calibrate
from tests.decomposers.oracle import distance


@dataclass
class Example:
    image: torch.Tensor


def whole(batches, **limits):
    """Batches of which nothing is held out."""
    return tdecomp.Data(batches, held_out=0, **limits)


def taken(model, batches, *, max_batches=None, max_memory=None, **options):
    data = whole(batches, max_batches=max_batches, max_memory=max_memory)
    return calibrate(model, data, progress=False, **options)


def images(count=8, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def small(seed=0):
    """Two convolutions and a Linear, which sees fewer samples than it has inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 5, 3, bias=False),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(20, 5),
        )


def check_same(one, other, bound=1e-6):
    """That two moments are of the same inputs, up to rounding."""
    assert one.layers.keys() == other.layers.keys()
    assert one.unreached == other.unreached
    for name in one:
        mine, others = one[name], other[name]
        assert (mine.spec, mine.count, mine.sizes) == (others.spec, others.count, others.sizes)
        for part in ("mean", "matrix", "rows", "gradient"):
            a, b = getattr(mine, part), getattr(others, part)
            assert (a is None) == (b is None), (name, part)
            if a is not None:
                assert distance(a, b) < bound, (name, part)
