"""Layers again, with the products of the factors."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import tdecomp
from tdecomp import recompose
from tests.unchanged import unchanged

QUIET = {"progress": False, "allow_expansion": True}
X = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A layer under two names, and one inside a container."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(6, 12, 3, padding=1)
        self.again = nn.Conv2d(12, 12, 3, padding=1, groups=2, bias=False)
        self.same = self.again
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(12 * 64, 10))

    def forward(self, x):
        return self.head(self.same(self.again(self.first(x).relu()).relu()))


def small(rank=3, **options):
    torch.manual_seed(0)
    methods = ["lowrank", "svd"]
    return tdecomp.decompose(Net().eval(), methods, rank=rank, **QUIET, **options).model


def chains_in(model):
    return [module for module in model.modules() if isinstance(module, tdecomp.Chain)]


def test_the_copy_computes_the_same_from_stock_layers():
    model = small()
    model.first.requires_grad_(False)
    with unchanged(model):
        whole = recompose(model)
    assert len(chains_in(model)) == 3
    assert chains_in(whole) == []
    assert whole.again is whole.same
    assert list(whole.state_dict()) == list(Net().state_dict())
    torch.testing.assert_close(whole(X), model(X))
    assert not whole.first.weight.requires_grad
    assert whole.again.weight.requires_grad
    assert not whole.training


def test_in_place_it_is_the_model_itself():
    model = small()
    out, head = model(X), model.head
    assert recompose(model, inplace=True) is model
    assert model.head is head
    assert type(model.head[1]) is nn.Linear
    torch.testing.assert_close(model(X), out)


def test_what_was_trained_since_is_in_the_weights():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(X).square().mean().backward()
    optimizer.step()
    whole = recompose(model)
    assert whole.first.training
    torch.testing.assert_close(whole(X), model(X))


def test_a_single_weight_is_the_product_in_float64_rounded_once():
    model = small().to(torch.bfloat16)
    chain = model.head[1]
    product = chain[1].weight.double() @ chain[0].weight.double()
    layer = chain.to_layer()
    assert torch.equal(layer.weight, product.bfloat16())
    assert torch.equal(layer.bias, chain[1].bias)


def test_channels_last_stay_last():
    model = small().to(memory_format=torch.channels_last)
    weight = recompose(model).first.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_it_can_be_decomposed_again():
    model = small()
    again = tdecomp.decompose(recompose(model), ["lowrank", "svd"], rank=3, **QUIET)
    # The products have rank 3 at most, so that nothing is lost.
    torch.testing.assert_close(again.model(X), model(X), rtol=1e-4, atol=1e-5)


def test_layers_whose_factors_are_shared_share_their_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = tdecomp.decompose(model, "svd", rank=2, progress=False).model
    for mine, other in zip(model[1], model[0], strict=True):
        mine.weight = other.weight
    whole = recompose(model)
    assert whole[0].weight is whole[1].weight
    assert not torch.equal(whole[0].bias, whole[1].bias)


def test_a_model_that_is_a_chain():
    chain = tdecomp.decompose(nn.Linear(8, 8), "svd", rank=2, progress=False).model
    x = torch.randn(3, 8)
    torch.testing.assert_close(recompose(chain)(x), chain(x))
    with pytest.raises(ValueError, match="cannot be replaced in place"):
        recompose(chain, inplace=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_attention_is_what_it_was(inplace):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    keys = list(model.state_dict())
    model = tdecomp.decompose(model, "svd", rank=4, **QUIET).model
    x = torch.randn(2, 5, 16)
    out = model(x)
    assert type(model.self_attn) is not nn.MultiheadAttention
    whole = recompose(model, inplace=inplace)
    assert type(whole.self_attn) is nn.MultiheadAttention
    assert list(whole.state_dict()) == keys
    torch.testing.assert_close(whole(x), out)
    assert (whole is model) == inplace


def test_in_place_is_all_or_nothing(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.MultiheadAttention(16, 2))
    model = tdecomp.decompose(model, "svd", rank=4, **QUIET).model
    monkeypatch.setattr(type(model[1]), "close_up", lambda _: 1 / 0)
    with unchanged(model), pytest.raises(ZeroDivisionError):
        recompose(model, inplace=True)
    assert len(chains_in(model)) == 3


def test_no_chain_is_an_error_in_words():
    with pytest.raises(ValueError, match=r"recompose: the model \(Net\) has no chain; expected"):
        recompose(Net())
    with pytest.raises(TypeError, match=r"expected an nn.Module, got str"):
        recompose("model")


class Untold(tdecomp.SVD):
    """A method that cannot tell its factors."""

    name = "untold"

    def factors_of(self, stage_weights):
        del stage_weights


def quantized(chain):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that this is old
        return torch.ao.quantization.quantize_dynamic(chain, {nn.Linear})


def hooked(chain):
    chain[0].register_forward_hook(lambda *_: None)
    return chain


def offloaded(chain):
    chain[0]._hf_hook = object()
    return chain


def shortened(chain):
    del chain[1]
    return chain


@pytest.mark.parametrize(
    "change, message",
    [
        (
            quantized,
            r"'head.1': its stage 0 is a torch.ao.*Linear now, svd made a Linear: merge",
        ),
        (hooked, "layer 'head.1': its Linear has hooks of its own, which would be lost"),
        (offloaded, "layer 'head.1': accelerate moves its weights"),
        (shortened, "layer 'head.1': it has 1 stages, svd made 2"),
    ],
)
def test_a_chain_that_is_no_longer_what_was_made(change, message):
    model = small()
    model.head[1] = change(copy.deepcopy(model.head[1]))
    with unchanged(model), pytest.raises(ValueError, match=message):
        recompose(model, inplace=True)


@pytest.mark.usefixtures("own_methods")
def test_a_method_that_cannot_tell_its_factors():
    tdecomp.register(Untold())
    model = nn.Sequential(nn.Linear(8, 8))
    model = tdecomp.decompose(model, "untold", rank=2, progress=False).model
    with pytest.raises(ValueError, match="layer '0': untold cannot tell the factors of its chain"):
        recompose(model)
    with pytest.raises(ValueError, match="the chain stands for no layer"):
        tdecomp.Chain(nn.Linear(2, 2)).to_layer()


def test_a_parametrized_stage_is_baked_in():
    model = small()
    parametrizations.weight_norm(model.head[1][1])
    with torch.no_grad():
        model.head[1][1].parametrizations.weight.original0.mul_(2)
    torch.testing.assert_close(recompose(model)(X), model(X))
