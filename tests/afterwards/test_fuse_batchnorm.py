"""Batch norm folded into layers and chains, exactly."""

import copy

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp import batchnorm_folds, fuse_batchnorm
from tests.afterwards.norms import X, conv, norm_for
from tests.unchanged import unchanged

QUIET = {"progress": False, "allow_expansion": True}
# A layer with 12 outputs, and an input of it.
LAYERS = {
    "linear": (lambda: nn.Linear(8, 12), (5, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, bias=False), (2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), (2, 8, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(8, 12, 3, stride=2), (2, 8, 5, 5, 5)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4, bias=False), (2, 8, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(12, 12, 3, groups=12), (2, 12, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose1d(8, 12, 3, stride=2), (2, 8, 9)),
    "transposed-2": (lambda: nn.ConvTranspose2d(8, 12, 3, groups=2), (2, 8, 6, 6)),
    "transposed-3": (lambda: nn.ConvTranspose3d(8, 12, 3, groups=2, bias=False), (2, 8, 4, 4, 4)),
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_takes_its_batch_norm(kind, affine):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = nn.Sequential(make(), norm_for(x, affine=affine), nn.ReLU()).eval()
    layer, out = model[0], model(x)
    with unchanged(model):
        fused = fuse_batchnorm(model, x)
    assert type(fused[0]) is type(layer)
    assert type(fused[1]) is nn.Identity
    assert fused[0].bias.requires_grad
    torch.testing.assert_close(fused(x), out)
    if kind != "linear":
        torch.testing.assert_close(fuse_batchnorm(model)(x), out)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", ["lowrank", "spatial", "tucker2", "cp", "cp-separable", "svd"])
def test_the_last_stage_of_a_chain_takes_it(method, bias):
    torch.manual_seed(0)
    layer = conv(bias=bias, kernel=1 if method == "svd" else 3)
    model = nn.Sequential(layer, norm_for(X), nn.ReLU()).eval()
    rank = (4, 4) if method == "tucker2" else 4
    model = tdecomp.decompose(model, method, rank=rank, **QUIET).model
    first, stages = model[0][0].weight, len(model[0])
    fused = fuse_batchnorm(model)
    torch.testing.assert_close(fused(X), model(X))
    chain = fused[0]
    assert isinstance(chain, tdecomp.Chain)
    assert (len(chain), chain.method, chain.rank) == (stages, method, rank)
    assert torch.equal(chain[0].weight, first)
    assert chain[0].weight is not first
    assert chain.replaced.bias
    assert chain.bias.shape == (12,)
    assert model[0].replaced.bias == bias
    # It can go on to lower ranks and back to a layer.
    torch.testing.assert_close(tdecomp.recompose(fused)(X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_rounded_once(dtype):
    model = nn.Sequential(conv(), norm_for(X)).eval().to(dtype)
    exact = fuse_batchnorm(copy.deepcopy(model).double())
    fused = fuse_batchnorm(model)
    assert torch.equal(fused[0].weight, exact[0].weight.to(dtype))
    assert torch.equal(fused[0].bias, exact[0].bias.to(dtype))


def test_in_place_all_else_stays_the_same_object():
    model = nn.Sequential(conv(), norm_for(X), nn.Sequential(conv(bias=False), norm_for(X))).eval()
    model[0].weight.requires_grad_(False)
    out, inner = model(X), model[2]
    assert fuse_batchnorm(model, inplace=True) is model
    assert model[2] is inner
    assert not model[0].weight.requires_grad
    torch.testing.assert_close(model(X), out)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_channels_last_stay_last():
    model = nn.Sequential(conv(), norm_for(X)).eval().to(memory_format=torch.channels_last)
    weight = fuse_batchnorm(model)[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_nothing_to_fold():
    model = nn.Sequential(conv(), nn.ReLU()).eval()
    assert batchnorm_folds(model) == []
    assert fuse_batchnorm(model, inplace=True) is model
    assert torch.equal(fuse_batchnorm(model)(X), model(X))


def test_a_model_is_saved_before_it_is_fused(tmp_path):
    model = nn.Sequential(conv(bias=False), norm_for(X)).eval()
    result = tdecomp.decompose(model, "lowrank", rank=4, **QUIET)
    result.save(tmp_path / "small.safetensors")
    loaded = fuse_batchnorm(tdecomp.load(tmp_path / "small.safetensors", model))
    torch.testing.assert_close(loaded(X), result.model(X))
    fuse_batchnorm(result.model, inplace=True)
    with pytest.raises(
        ValueError, match=r"layer '0' stands for .*, as after fuse_batchnorm; a file"
    ):
        result.save(tmp_path / "fused.safetensors")


def test_train_mode_is_refused_in_words():
    model = nn.Sequential(conv(), norm_for(X))
    with pytest.raises(
        ValueError, match=r"the model is in train mode, .*; expected one in eval mode"
    ):
        fuse_batchnorm(model)
    with pytest.raises(TypeError, match=r"expected an nn.Module"):
        fuse_batchnorm("model")
    with pytest.raises(ValueError, match=r"the model rejected example_inputs \(float32 tensor"):
        fuse_batchnorm(model.eval(), X[:, :3])


def test_in_place_is_all_or_nothing(monkeypatch):
    model = nn.Sequential(conv(), norm_for(X), conv(), norm_for(X)).eval()
    monkeypatch.setattr(nn.Identity, "__init__", lambda *_: 1 / 0)
    with unchanged(model), pytest.raises(ZeroDivisionError):
        fuse_batchnorm(model, inplace=True)
