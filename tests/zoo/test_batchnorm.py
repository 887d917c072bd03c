"""Batch norm of whole models folded, with what timm and torchvision make of it."""

import pytest
import timm
import torch
import torchvision
from torchvision.ops import FrozenBatchNorm2d

import tdecomp
from tdecomp.model.batchnorm import is_batchnorm

pytestmark = pytest.mark.slow

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
# The batch norms that stay: before the convolution, or of a branch without one.
STAY = {
    "resnet18": 0,
    "regnetx_002": 0,
    "repvgg_a0": 17,
    "efficientnet_b0": 0,
}


def with_statistics(model):
    generator = torch.Generator().manual_seed(0)
    for norm in filter(is_batchnorm, model.modules()):
        norm.running_mean.normal_(generator=generator)
        norm.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


def model_of(name):
    torch.manual_seed(0)
    return with_statistics(timm.create_model(name, num_classes=10))


def check(model, fused):
    # In float64, as the activations of deep networks at random weights amplify rounding.
    out = model.double()(X.double())
    torch.testing.assert_close(fused.double()(X.double()), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STAY)
def test_models_of_timm(name):
    model = model_of(name)
    folds = tdecomp.batchnorm_folds(model)
    assert folds == tdecomp.batchnorm_folds(model, X)
    assert sum(fold.reason is not None for fold in folds) == STAY[name]
    fused = tdecomp.fuse_batchnorm(model)
    assert sum(map(is_batchnorm, fused.modules())) == STAY[name]
    check(model, fused)


def test_decomposed_first_and_fused_in_place():
    model = model_of("efficientnet_b0")
    small = tdecomp.decompose(model, "svd", rank=0.75, example_inputs=X, progress=False).model
    out = small.double()(X.double())
    assert tdecomp.fuse_batchnorm(small, inplace=True) is small
    assert not any(map(is_batchnorm, small.modules()))
    torch.testing.assert_close(small(X.double()), out)


def test_batch_norms_that_are_frozen():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10, norm_layer=FrozenBatchNorm2d)
    model = with_statistics(model)
    fused = tdecomp.fuse_batchnorm(model)
    assert not any(map(is_batchnorm, fused.modules()))
    check(model, fused)


def test_branches_are_hinted_at_until_they_are_merged():
    def hints(model):
        notes = tdecomp.plan(model, "lowrank", rank=8, example_inputs=X, progress=False).notes
        return [note for note in notes if note.startswith("hint")]

    model = model_of("repvgg_a0")
    assert hints(model) == [
        "hint: 22 blocks have branches that merge into one layer exactly ('stem'): merge them"
        " before decomposing, timm.utils.reparameterize_model(model)"
    ]
    assert hints(timm.utils.reparameterize_model(model)) == []
