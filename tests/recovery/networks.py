"""Small networks that behave like trained ones: few directions of the inputs carry most."""

import torch
from torch import nn

import tdecomp

QUIET = {"progress": False}


def convnet(seed=0, dtype=torch.float32):
    """Convolutions with batch norms whose statistics are those of the images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(48, 10),
        )
    for norm in (model[1], model[4]):
        norm.momentum = None
    for batch in images(8):
        model(batch)
    for norm in (model[1], model[4]):
        norm.momentum = 0.1
    return model.eval().to(dtype)


def images(count=4, size=16, seed=1, dtype=torch.float32):
    """Batches of smooth images: sums of a few patterns."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    amounts = torch.randn(count, size, 6, generator=generator)
    noise = 0.1 * torch.randn(count, size, 3, 8, 8, generator=generator)
    return list((torch.einsum("bsp,pchw->bschw", amounts, patterns) + noise).to(dtype))


def mlp(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 8)
        )


def vectors(count=3, size=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 16, generator=generator) for _ in range(count)]


def whole(batches):
    """Data of which nothing is held out: errors are those of all batches."""
    return tdecomp.Data(batches, held_out=0)


def decomposed(model, method="svd", rank=3, **options):
    return tdecomp.decompose(model, method, rank=rank, **QUIET, **options).model
