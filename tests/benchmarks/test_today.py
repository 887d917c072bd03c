"""The ways of today: chains that give the layer's outputs where the rank is full."""

import pytest
import torch
from torch import nn

import tdecomp
from benchmarks.support.today import (
    TODAY,
    cp_of_conv,
    decomposed,
    svd_of_conv,
    svd_of_layer,
    takes,
    tucker_of_conv,
)

GEOMETRIES = {
    "plain": {"kernel_size": 3},
    "uneven": {"kernel_size": (3, 2), "padding": (2, 0), "stride": (1, 2), "dilation": (1, 2)},
    "same": {"kernel_size": (1, 3), "padding": "same", "bias": False},
    "reflected": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
}


def largest_error(layer, chain, *size):
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((layer(x) - chain(x)).abs().max())


@pytest.fixture(params=GEOMETRIES)
def conv(request):
    torch.manual_seed(0)
    return nn.Conv2d(4, 5, **GEOMETRIES[request.param])


@pytest.mark.parametrize("replace, rank", [(svd_of_conv, 5), (tucker_of_conv, (4, 5))])
def test_a_full_rank_gives_the_layers_outputs(conv, replace, rank):
    with torch.no_grad():
        assert largest_error(conv, replace(conv, rank), 4, 9, 9) < 1e-5


def test_cp_of_a_kernel_of_rank_one_gives_the_layers_outputs(conv):
    parts = [
        torch.randn(size, generator=torch.Generator().manual_seed(2)) for size in conv.weight.shape
    ]
    with torch.no_grad():
        conv.weight.copy_(torch.einsum("i,j,k,l->ijkl", *parts))
        chain = cp_of_conv(conv, 1)
    assert largest_error(conv, chain, 4, 9, 9) < 1e-4


def test_a_linear_layer_by_svd():
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        assert largest_error(layer, svd_of_layer(layer, 4), 6) < 1e-5


@pytest.mark.parametrize("name", ["plain-svd", "tensorly-tucker", "tensorly-cp"])
def test_a_whole_model_has_the_costs_of_tdecomps_chains(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.Flatten(),
                          nn.Linear(16 * 36, 16))  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    way = TODAY[name]
    plan = tdecomp.plan(model, [way.like, "svd"], rank=0.5, example_inputs=x, progress=False)
    result = decomposed(model, plan, way)
    assert sum(p.numel() for p in result.parameters()) == plan.after.params
    assert isinstance(model[0], nn.Conv2d)
    ours = tdecomp.apply(model, plan, progress=False).model
    with torch.no_grad():
        errors = [float((m(x) - model(x)).norm()) for m in (result, ours)]
    assert errors[0] == pytest.approx(errors[1], rel=0.3)


def test_what_the_recipe_takes():
    assert takes(nn.Linear(2, 2))
    assert takes(nn.Conv2d(2, 2, 1))
    assert not takes(nn.Conv2d(2, 2, 1, groups=2))
    assert not takes(nn.Conv1d(2, 2, 1))


def test_what_is_not_installed_says_so():
    way = TODAY["plain-svd"]
    assert way.missing() is None
    assert type(way)(way.like, way.replace, "no-such-package").missing() == (
        "no-such-package is not installed"
    )
