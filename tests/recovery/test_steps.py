"""The steps as switches of decompose and apply."""

import pytest
import torch
from torch import nn

import tdecomp
from tests.recovery.networks import QUIET, convnet, images, mlp, vectors
from tests.unchanged import unchanged

ALL = {"refit": True, "recalibrate_batchnorm": True, "distill": True}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A few steps show as much of the wiring as two hundred do."""
    usual = tdecomp.recovery.distill
    monkeypatch.setattr(
        "tdecomp.recovery.distill", lambda *args, **kwargs: usual(*args, steps=20, **kwargs)
    )


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_the_whole_pipeline_says_what_each_step_did():
    model, batches = convnet(), images()
    options = {"rank": tdecomp.Budget(macs=0.2), "example_inputs": batches[0], **QUIET}
    with unchanged(model):
        result = tdecomp.decompose(model, "dense", data=batches, **ALL, **options)
    names = [recovery.step for recovery in result.report.recovery]
    assert names == list(ALL)
    refit, batchnorm, distill = result.report.recovery
    assert refit.error_after == batchnorm.error_before
    assert refit.error_after < refit.error_before
    assert distill.error_after < distill.error_before
    summary = result.report.summary()
    assert summary in str(result.report)
    for one in result.report.recovery:
        assert str(one) in summary
        assert f"{one.error_before:.4g} → {one.error_after:.4g}" in summary
    assert result.report.after.macs <= 0.2 * result.report.before.macs


@pytest.mark.parametrize("step", list(ALL))
def test_a_switch_is_the_function(step):
    model, batches = convnet(), images()
    plain = tdecomp.decompose(model, "lowrank", rank=3, data=batches, **QUIET)
    assert plain.report.recovery == ()
    found = tdecomp.decompose(model, "lowrank", rank=3, data=batches, **{step: True}, **QUIET)
    if step == "recalibrate_batchnorm":
        alone = tdecomp.recalibrate_batchnorm(plain.model, batches, original=model, **QUIET)
    elif step == "refit":
        alone = tdecomp.refit(plain.model, model, batches, **QUIET)
    else:
        alone = tdecomp.recovery.distill(plain.model, model, batches, **QUIET)
    assert equal(state(found.model), state(alone.model))
    assert found.report.recovery[0].error_after == alone.error_after
    applied = tdecomp.apply(model, plain.plan, data=batches, **{step: True}, **QUIET)
    assert equal(state(applied.model), state(found.model))


def test_in_place_with_an_optimizer():
    model, batches = mlp(), vectors()
    wanted = tdecomp.decompose(model, "svd", rank=3, data=batches, **ALL, **QUIET)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = tdecomp.decompose(
        model, "svd", rank=3, data=batches, inplace=True, optimizers=optimizer, **ALL, **QUIET
    )
    assert result.model is model
    assert equal(state(model), state(wanted.model))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert all(p.grad is None for p in model.parameters())
    before = state(model)
    model(batches[0]).square().mean().backward()
    optimizer.step()
    assert not equal(before, state(model))


@pytest.mark.parametrize("step", list(ALL))
def test_in_place_all_or_nothing(step):
    model = nn.Sequential(*mlp(), nn.BatchNorm1d(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    good = vectors(5)
    plan = tdecomp.plan(model, "svd", rank=3, **QUIET)
    calls = []

    def forward(model, batch):  # what calibrates runs through, what comes after does not
        calls.append(batch)
        if len(calls) > len(good) + 2:
            raise RuntimeError("out of something")
        return model(batch)

    with (
        unchanged(model, optimizer),
        pytest.raises(ValueError, match=f"{step}: the model rejected a batch.*out of something"),
    ):
        tdecomp.apply(
            model, plan, data=good, forward=forward, inplace=True, optimizers=optimizer,
            **{step: True}, **QUIET,
        )  # fmt: skip


@pytest.mark.parametrize("step", list(ALL))
@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: None, "runs the model on batches, got none; expected data="),
        (lambda: tdecomp.calibrate(mlp(), vectors(), **QUIET), "on batches, got moments; expected"),
        (lambda: (x for x in vectors()), "got generator, which yields them only once"),
    ],
)
def test_data_that_a_step_cannot_be_taken_with(step, make, words):
    model = mlp()
    plan = tdecomp.plan(model, "svd", rank=3, **QUIET)
    with unchanged(model):
        with pytest.raises(ValueError, match=f"{step}.*{words}"):
            tdecomp.decompose(model, "svd", rank=3, data=make(), inplace=True, **{step: True})
        with pytest.raises(ValueError, match=f"{step}.*{words}"):
            tdecomp.apply(model, plan, data=make(), inplace=True, **{step: True})


def test_nothing_decomposed_is_nothing_to_recover():
    model, batches = mlp(), vectors()
    with unchanged(model):
        result = tdecomp.decompose(
            model, "svd", rank=tdecomp.Budget(macs=1.0), example_inputs=batches[0], data=batches,
            **ALL, **QUIET,
        )  # fmt: skip
    assert equal(state(result.model), state(model))
    assert result.report.summary().count("no layer was decomposed") == 3


def test_how_the_model_is_called_reaches_every_step():
    model, batches = mlp(), vectors(5)
    wanted = tdecomp.decompose(model, "svd", rank=3, data=batches[:2], **ALL, **QUIET)
    named = [{"image": x} for x in batches]
    found = tdecomp.decompose(
        model, "svd", rank=3, data=named, forward=lambda m, b: m(b["image"]), max_batches=2,
        **ALL, **QUIET,
    )  # fmt: skip
    assert equal(state(wanted.model), state(found.model))
