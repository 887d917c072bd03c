"""Whole models of torchvision at random weights: every method that has something to do there."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import pytest
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

import tdecomp
from benchmarks.support.torchvision_import import import_torchvision
from tests.models import torch_macs

zoo = import_torchvision().models
# Fits of large layers take minutes, and show nothing that those of smaller ones do not.
LARGEST = 2_500_000
HALF = tdecomp.Ratio(0.5, of="macs")
# Few sweeps: what is looked at here has nothing to do with how good the fit is.
METHODS = {
    "svd": tdecomp.SVD(),
    "lowrank": tdecomp.LowRank(),
    "spatial": tdecomp.Spatial(),
    "tucker2": tdecomp.Tucker2(n_iter_max=2),
    "cp": tdecomp.CP(n_iter_max=2),
    "cp-separable": tdecomp.CPSeparable(n_iter_max=2),
}


ITERATED = ("tucker2", "cp", "cp-separable")


@dataclass(frozen=True)
class Case:
    """A model and the size of the square images that it is given.

    Attributes
    ----------
    aux : bool
        Whether some of its layers run only while its `training` is set.
    largest_iterated : int
        The most entries of a weight that an iterated fit is asked for.
    """

    build: Callable[[], nn.Module]
    size: int = 64
    aux: bool = False
    largest_iterated: int = 40_000

    def model(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.build().eval()
            # Some heads start at zero, and no gradient passes through those.
            for parameter in model.parameters():
                if parameter.dim() > 1 and not parameter.any():
                    nn.init.normal_(parameter, std=0.02)
        model.training = self.aux
        return model

    def inputs(self):
        generator = torch.Generator().manual_seed(1)
        return torch.randn(2, 3, self.size, self.size, generator=generator)


def _fpn():
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    # The first three of its five stages are frozen.
    return resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=2)


def _without_weights(name):
    if name.startswith("segmentation."):
        build = getattr(zoo.segmentation, name.removeprefix("segmentation."))
        return partial(build, weights=None, weights_backbone=None, num_classes=4)
    return partial(getattr(zoo, name), weights=None, num_classes=10)


def _small_vit():
    return zoo.VisionTransformer(32, 8, 2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10)


def _small_swin(version=1):
    block = zoo.swin_transformer.SwinTransformerBlock
    merging = zoo.swin_transformer.PatchMerging
    if version == 2:
        block = zoo.swin_transformer.SwinTransformerBlockV2
        merging = zoo.swin_transformer.PatchMergingV2
    return zoo.SwinTransformer(
        [4, 4], 32, [2, 2], [2, 4], [4, 4], num_classes=10, block=block, downsample_layer=merging
    )


def _small_convnext():
    from torchvision.models.convnext import CNBlockConfig

    stages = [CNBlockConfig(32, 64, 1), CNBlockConfig(64, None, 1)]
    return zoo.ConvNeXt(stages, num_classes=10)


def _small_densenet():
    return zoo.DenseNet(16, (2, 2), 32, num_classes=10)


SMALL = {
    "resnet18": Case(_without_weights("resnet18"), 32),
    "mobilenet_v2": Case(_without_weights("mobilenet_v2"), 32),
    "densenet": Case(_small_densenet, 32),
    "convnext": Case(_small_convnext, 32),
    "vit": Case(_small_vit, 32),
    "swin": Case(_small_swin, 32),
}
WHOLE = {
    "resnet18": Case(_without_weights("resnet18"), 64),
    "resnet50": Case(_without_weights("resnet50"), 64),
    "mobilenet_v2": Case(_without_weights("mobilenet_v2"), 64),
    "densenet121": Case(_without_weights("densenet121"), 64),
    "googlenet": Case(
        partial(zoo.googlenet, weights=None, init_weights=False, num_classes=10), 64, aux=True
    ),
    "efficientnet_b0": Case(_without_weights("efficientnet_b0"), 64),
    "convnext_tiny": Case(_without_weights("convnext_tiny"), 64),
    "vit_b_16": Case(
        partial(_without_weights("vit_b_16"), image_size=64), 64, largest_iterated=600_000
    ),
    "swin_t": Case(_without_weights("swin_t"), 64),
    "deeplabv3": Case(_without_weights("segmentation.deeplabv3_resnet50"), 64),
    "lraspp": Case(_without_weights("segmentation.lraspp_mobilenet_v3_large"), 64),
    "resnet18_fpn": Case(_fpn, 64),
    "vgg16": Case(_without_weights("vgg16"), 32),
}


def shapes(output):
    leaves, structure = pytree.tree_flatten(output)
    return [tuple(leaf.shape) for leaf in leaves], structure


@lru_cache(maxsize=1)
def original(case):
    """The model, its input, its MACs and the shape of its output."""
    model, x = case.model(), case.inputs()
    with torch.no_grad():
        return model, x, torch_macs(model, x), shapes(model(x))


def check(case, method):
    model, x, macs_before, expected = original(case)
    largest = case.largest_iterated if method in ITERATED else LARGEST
    result = tdecomp.decompose(
        model,
        METHODS[method],
        rank=HALF,
        example_inputs=x,
        where=lambda layer, _: layer.weight.numel() <= largest,
        progress=False,
    )
    report, decomposed = result.report, result.model
    rows = {row.name: row for row in report}

    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, _ConvNd))}
    attention = (n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention))
    layers |= {f"{name}.in_proj_weight" for name in attention}
    now, parameters = dict(decomposed.named_modules()), dict(model.named_parameters())
    others = {row.name for row in report if row.layer is None}
    assert set(rows) - others == layers
    changed = {name for name, row in rows.items() if row.method is not None}
    assert changed
    assert all(rows[name].reason for name in others)
    for name in layers:
        row = rows[name]
        assert (row.reason is None) == (name in changed)
        assert isinstance(now.get(name), tdecomp.Chain) == (name in changed)
        if name in changed:
            halved = row.params_before if row.note else row.macs_before
            assert 0 < (row.params_after if row.note else row.macs_after) <= 0.5 * halved
            assert 0 <= row.weight_error <= 1.1

    assert report.before.macs == macs_before
    assert report.after.macs == torch_macs(decomposed, x)
    assert report.before.params == sum(p.numel() for p in model.parameters())
    assert report.after.params == sum(p.numel() for p in decomposed.parameters())

    output = decomposed(x)
    assert shapes(output) == expected
    leaves = pytree.tree_leaves(output)
    assert all(leaf.isfinite().all() for leaf in leaves)
    # Some of the networks shrink their input by many orders when nothing has been trained.
    sum((leaf / leaf.detach().abs().max()).square().sum() for leaf in leaves).backward()
    for name in changed:
        wanted = parameters.get(name, parameters.get(f"{name}.weight")).requires_grad
        for part, parameter in decomposed.get_submodule(name).named_parameters():
            assert parameter.requires_grad == wanted, (name, part)
            if wanted:
                assert parameter.grad is not None, (name, part)
                assert parameter.grad.isfinite().all(), (name, part)
                assert parameter.grad.any(), (name, part)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SMALL)
def test_small_model(name, method):
    check(SMALL[name], method)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", WHOLE)
def test_whole_model(name, method):
    check(WHOLE[name], method)


def reasons(model, example_inputs=None):
    plan = tdecomp.plan(
        model, ["svd", "lowrank"], rank=2, example_inputs=example_inputs, allow_expansion=True
    )
    return {row.name: row.reason for row in plan if row.layer is not None}


ATTENTION = {
    "swin": (
        _small_swin,
        (2, 3, 32, 32),
        ("attn.qkv", "attn.proj"),
        "shifted-window attention reads its weight itself",
    ),
    "swin_v2": (
        partial(_small_swin, version=2),
        (2, 3, 32, 32),
        ("attn.qkv", "attn.proj"),
        "shifted-window attention reads its weight itself",
    ),
}


@pytest.mark.parametrize("seen", [True, False], ids=["example_inputs", "no inputs"])
@pytest.mark.parametrize("name", ATTENTION)
def test_layers_that_attention_reads_are_left_alone(name, seen):
    build, shape, endings, wanted = ATTENTION[name]
    model = build().eval()
    found = reasons(model, torch.zeros(shape) if seen else None)
    left = {n for n, reason in found.items() if reason is not None}
    assert left == {n for n in found if n.endswith(endings)}
    assert left
    assert all(found[n].endswith(wanted) for n in left)
    # Every other one is replaced, and the model still runs.
    result = tdecomp.decompose(
        model, ["svd", "lowrank"], rank=2, allow_expansion=True, progress=False
    )
    assert result.model(torch.zeros(shape)).isfinite().all()


class Reader(nn.Module):
    """An attention of nobody's list, which hands its weights to a function."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = torch.nn.functional.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, dim=-1)
        return self.proj(torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_unknown_attention_is_found_by_running_it():
    found = reasons(Reader(), torch.zeros(2, 5, 16))
    assert found == {"qkv": "its weight is read outside its own forward", "proj": None}


@pytest.mark.parametrize("fast_path", [True, False])
def test_vit_output_does_not_depend_on_the_fast_path(fast_path):
    case = SMALL["vit"]
    x = case.inputs()
    result = tdecomp.decompose(
        case.model(), ["svd", "lowrank"], rank=0.5, example_inputs=x, progress=False
    )
    changed = {row.name for row in result.report if row.method}
    layers = {"conv_proj", "in_proj_weight", "0", "3", "head"}
    assert {name.rpartition(".")[2] for name in changed} == layers
    expected = result.model(x)
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        with torch.no_grad():
            torch.testing.assert_close(result.model(x), expected)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
