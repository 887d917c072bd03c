"""A network with all that files have to keep, and models compared in every way."""

import copy
from collections import defaultdict

import torch
from torch import nn
from torch.nn.functional import relu

import tdecomp

METHODS = {
    "svd": "svd",
    "lowrank": "lowrank",
    "spatial": "spatial",
    "tucker2": "tucker2",
    "cp": tdecomp.CP(n_iter_max=2),
    "cp-separable": tdecomp.CPSeparable(n_iter_max=2),
    "tt": tdecomp.TT(),
}


class Table(nn.Embedding):
    """Its own forward keeps it, and what is tied to it, from becoming chains."""

    def forward(self, ids):
        return super().forward(ids)


class Net(nn.Module):
    """Plain, grouped, transposed and pointwise layers, a tie, a module used twice, buffers."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.grouped = nn.Conv2d(width, 16, 3, groups=2, stride=2, padding=1, bias=False)
        self.up = nn.ConvTranspose2d(16, 12, 3, stride=2, padding=1, output_padding=1)
        self.point = nn.Conv2d(12, 12, 1)
        self.twice = nn.Linear(12, 12)
        self.again = self.twice
        self.embed = Table(10, 12)
        self.head = nn.Linear(12, 10, bias=False)
        self.head.weight = self.embed.weight
        self.table = nn.Parameter(torch.randn(5, 12).T)
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("mask", torch.arange(12) % 5 > 0)

    def forward(self, x):
        x = self.point(relu(self.up(self.grouped(relu(self.stem(x))))))
        x = self.again(relu(self.twice(x.mean((2, 3))))) * self.mask * self.scale
        return self.head(x + self.embed.weight.mean(0)), x @ self.table


def net(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Net(**options)
        # Batch norms as after some training.
        with torch.no_grad():
            model.train()(torch.randn(8, 3, 6, 6))
    return model.eval()


def batch(dtype=torch.float32):
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def decomposed(model=None, method="lowrank", **options):
    return tdecomp.decompose(
        net() if model is None else model,
        [METHODS[method]] if method == "svd" else [METHODS[method], "svd"],
        rank=0.5,
        allow_expansion=True,
        progress=False,
        **options,
    )


def sharing(model):
    """Which names hold one and the same tensor."""
    holders = defaultdict(set)
    for kind in (model.named_parameters, model.named_buffers):
        for name, tensor in kind(remove_duplicate=False):
            holders[id(tensor)].add(name)
    return {frozenset(names) for names in holders.values()}


def assert_same(loaded, saved, x=None):
    """Bit for bit, in every way that a model can differ from another."""
    left, right = loaded.state_dict(), saved.state_dict()
    assert list(left) == list(right)
    for key, value in left.items():
        assert value.dtype == right[key].dtype, key
        assert value.stride() == right[key].stride(), key
        assert torch.equal(value, right[key]), key
    assert sharing(loaded) == sharing(saved)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in saved.modules()]
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in saved.named_parameters()
    }
    for one, other in zip(loaded.modules(), saved.modules(), strict=True):
        if isinstance(other, tdecomp.Chain):
            assert (one.method, one.rank, one.replaced) == (
                other.method,
                other.rank,
                other.replaced,
            )
    if x is not None:
        with torch.no_grad():
            expected = copy.deepcopy(saved).eval()(x)
            got = copy.deepcopy(loaded).eval()(x)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
