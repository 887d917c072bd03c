"""Batch norm statistics taken anew, against torch's own cumulative average."""

import copy
import math

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp import recalibrate_batchnorm
from tests.recovery.networks import QUIET, convnet, decomposed, images, mlp, vectors, whole
from tests.unchanged import unchanged


def by_torch(model, batches):
    """Statistics with momentum=None, as torch documents it, dropout off."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    with torch.no_grad():
        for x in batches:
            model(x)
    return model.state_dict()


def test_the_statistics_are_the_plain_average_over_the_batches():
    batches = images()
    model = nn.Sequential(nn.Dropout(0.5), *decomposed(convnet(), "lowrank"))
    recovery = recalibrate_batchnorm(model, whole(batches), **QUIET)
    for name, value in by_torch(model, batches).items():
        assert torch.equal(recovery.model.state_dict()[name], value), name
    assert recovery.model[2].num_batches_tracked == len(batches)
    assert recovery.model[2].momentum == 0.1
    assert recovery.notes == ("2 batch norms",)
    assert str(recovery) == "recalibrate_batchnorm; 2 batch norms"
    assert math.isnan(recovery.error_before)
    assert math.isnan(recovery.error_after)


def test_what_it_did_to_the_error():
    original, batches = convnet(), images()
    model = decomposed(original, "lowrank", rank=3)
    recovery = recalibrate_batchnorm(model, batches, original=original, **QUIET)
    assert recovery.error_after < recovery.error_before
    assert f"{recovery.error_before:.4g} → {recovery.error_after:.4g}" in str(recovery)


def test_the_given_models_are_as_they_were_in_whatever_mode():
    original = convnet().train()
    original[1].eval()
    model = decomposed(original, "lowrank")
    with unchanged(original, model):
        found = recalibrate_batchnorm(model, images(), original=original, **QUIET).model
    assert [m.training for m in found.modules()] == [m.training for m in model.modules()]
    with unchanged(original):
        inplace = recalibrate_batchnorm(model, images(), inplace=True, **QUIET)
    assert inplace.model is model
    for a, b in zip(model.state_dict().values(), found.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "bad, words",
    [
        (torch.zeros(2, 5, 8, 8), "rejected a batch"),
        (
            torch.full((2, 3, 8, 8), torch.nan),
            "layer '1': its inputs hold NaN.*Look at the batches",
        ),
    ],
)
def test_in_place_all_or_nothing(bad, words):
    model = convnet()
    with unchanged(model), pytest.raises(ValueError, match=f"recalibrate_batchnorm: .*{words}"):
        recalibrate_batchnorm(model, [*images(), bad], inplace=True, **QUIET)


def test_a_generator_will_do_unless_the_error_is_asked_for():
    model = convnet()
    found = recalibrate_batchnorm(model, iter(images()), **QUIET).model
    usual = recalibrate_batchnorm(model, images(), **QUIET).model
    assert torch.equal(found[4].running_var, usual[4].running_var)
    with pytest.raises(ValueError, match="goes through the batches more than once"):
        recalibrate_batchnorm(model, iter(images()), original=model, **QUIET)
    with pytest.raises(ValueError, match="recalibrate_batchnorm: got no batches"):
        recalibrate_batchnorm(model, [], **QUIET)
    moments = tdecomp.calibrate(model, images(), **QUIET)
    with pytest.raises(
        ValueError, match="recalibrate_batchnorm runs the model on batches, got mom"
    ):
        recalibrate_batchnorm(model, moments, **QUIET)


def test_a_model_without_any():
    bare = nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4, track_running_stats=False))
    for model in (mlp(), bare):
        with unchanged(model):
            recovery = recalibrate_batchnorm(model, vectors(), original=model, **QUIET)
        assert recovery.notes == ("the model has no batch norm that keeps statistics",)
        assert recovery.error_before == recovery.error_after == 0.0


def test_a_batch_norm_that_no_batch_reaches_keeps_its_statistics():
    model = nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4))
    model[1].extra = nn.BatchNorm1d(7, momentum=0.3)
    model[1].extra.running_mean.fill_(3.0)
    model[1].extra.num_batches_tracked.fill_(5)
    recovery = recalibrate_batchnorm(model, vectors(), **QUIET)
    kept = recovery.model[1].extra
    assert torch.equal(kept.running_mean, torch.full((7,), 3.0))
    assert (int(kept.num_batches_tracked), kept.momentum) == (5, 0.3)
    assert recovery.notes == ("1 batch norms", "no batch reached 1.extra")
