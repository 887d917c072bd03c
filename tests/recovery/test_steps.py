"""The steps of `recover`: how they are named, what they need, and what they do together."""

import json
import math

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp import Data, Distill, RecalibrateBatchnorm, Refit
from tdecomp.calibration.passes import batches_or_moments
from tdecomp.recovery.recovery import Recovery, RecoveryStep
from tdecomp.recovery.steps import check_data, recovery_steps, run_steps, use_variants
from tests.recovery.networks import QUIET, convnet, decomposed, images, mlp, vectors
from tests.unchanged import unchanged

ALL = ("refit", RecalibrateBatchnorm(), Distill(steps=20))
NAMES = ["refit", "recalibrate_batchnorm", "distill"]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


# Names and objects ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recover, steps",
    [
        (None, ()),
        ((), ()),
        ([], ()),
        ("refit", (Refit(),)),
        (Distill(steps=5), (Distill(steps=5),)),
        (["distill", "refit"], (Distill(), Refit())),
        (("refit", Refit(gradients=False), "refit"), (Refit(), Refit(gradients=False), Refit())),
        (NAMES, (Refit(), RecalibrateBatchnorm(), Distill())),
    ],
)
def test_steps_are_taken_as_named_in_the_order_given(recover, steps):
    assert recovery_steps(recover) == steps


@pytest.mark.parametrize("recover", ["refitt", ["refit", "finetune"], ""])
def test_unknown_step(recover):
    with pytest.raises(ValueError, match=r"recover: unknown step '.*expected 'refit', .*'distill'"):
        tdecomp.decompose(mlp(), "svd", rank=3, data=vectors(), recover=recover)


@pytest.mark.parametrize("recover", [True, 3, {"refit": True}, [None], Refit, [Distill]])
def test_what_is_no_step(recover):
    words = "make an instance" if isinstance(recover, type) else "expected 'refit'"
    with pytest.raises(TypeError, match=f"recover: got .*{words}"):
        recovery_steps(recover)


@pytest.mark.parametrize("options", [{"steps": 0}, {"lr": -1.0}, {"lr": math.nan}], ids=str)
def test_options_are_checked_when_a_step_is_made(options):
    with pytest.raises(ValueError, match="distill: expected"):
        Distill(**options)


class Rounded(RecoveryStep):
    """A user's own step."""

    name = "rounded"

    def run(self, model, original, batches, held_out):
        del original, batches
        before = held_out.error(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.mul(4).round().div(4))
        return Recovery(model, self.name, before, held_out.error(model), {}, ("to quarters",))


def test_a_step_of_one_s_own():
    model, batches = mlp(), vectors()
    result = tdecomp.decompose(model, "svd", rank=3, data=batches, recover=Rounded(), **QUIET)
    assert all(torch.equal(p, p.mul(4).round().div(4)) for p in result.model.parameters())
    assert str(result.report.recovery[0]).endswith("to quarters")


# What they need ---------------------------------------------------------------------------------


@pytest.mark.parametrize("step", NAMES)
@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: None, "runs the model on batches, got none; expected data="),
        (lambda: tdecomp.calibrate(mlp(), vectors(), **QUIET), "on batches, got moments; expected"),
        (lambda: (x for x in vectors()), "got generator, which yields them only once"),
        (lambda: Data(x for x in vectors()), "got generator, which yields them only once"),
    ],
    ids=["none", "moments", "generator", "Data"],
)
def test_data_that_a_step_cannot_be_taken_with(step, make, words):
    model = mlp()
    plan = tdecomp.plan(model, "svd", rank=3, **QUIET)
    with unchanged(model):
        with pytest.raises(ValueError, match=f"recover: {step}.*{words}"):
            tdecomp.decompose(model, "svd", rank=3, data=make(), inplace=True, recover=step)
        with pytest.raises(ValueError, match=f"recover: {step}.*{words}"):
            tdecomp.apply(model, plan, data=make(), inplace=True, recover=[step])
    with pytest.raises(ValueError, match=words):
        check_data(recovery_steps(step), batches_or_moments(make()))


def test_variants_are_for_fits_before_a_refit_or_a_training():
    assert use_variants(recovery_steps("refit"))
    assert use_variants(recovery_steps(["recalibrate_batchnorm", "distill"]))
    assert not use_variants(recovery_steps("recalibrate_batchnorm"))
    assert not use_variants(())


# What they do -----------------------------------------------------------------------------------


def test_the_whole_pipeline_says_what_each_step_did():
    model, batches = convnet(), images(60)
    options = {"rank": tdecomp.Budget(macs=0.2), "example_inputs": batches[0], **QUIET}
    with unchanged(model):
        result = tdecomp.decompose(model, "dense", data=batches, recover=ALL, **options)
    assert [recovery.step for recovery in result.report.recovery] == NAMES
    refit, batchnorm, distill = result.report.recovery
    assert refit.error_after == batchnorm.error_before
    assert refit.error_after < refit.error_before
    assert distill.error_after < distill.error_before
    summary = result.report.summary()
    assert summary[summary.index("2 of 3 layers") :] in str(result.report)  # after the warnings
    for one in result.report.recovery:
        assert str(one) in summary
        assert f"{one.error_before:.4g} → {one.error_after:.4g}" in summary
    assert result.report.after.macs <= 0.2 * result.report.before.macs


@pytest.mark.parametrize("step", ALL, ids=NAMES)
def test_a_step_is_the_function(step):
    model, batches = convnet(), images()
    plain = tdecomp.decompose(model, "lowrank", rank=3, data=batches, **QUIET)
    assert plain.report.recovery == ()
    found = tdecomp.decompose(model, "lowrank", rank=3, data=batches, recover=step, **QUIET)
    (recovery,) = found.report.recovery
    if recovery.step == "recalibrate_batchnorm":
        alone = tdecomp.recalibrate_batchnorm(plain.model, batches, original=model, **QUIET)
    elif recovery.step == "refit":
        alone = tdecomp.refit(plain.model, model, batches, **QUIET)
    else:
        alone = tdecomp.distill(plain.model, model, batches, steps=20, **QUIET)
    assert equal(state(found.model), state(alone.model))
    assert recovery.error_after == alone.error_after
    applied = tdecomp.apply(model, plain.plan, data=batches, recover=[step], **QUIET)
    assert equal(state(applied.model), state(found.model))


def test_the_order_is_the_one_given():
    original, batches = convnet(), images()
    plain = decomposed(original, "lowrank")
    data = batches_or_moments(batches, **QUIET)
    states = []
    for names in (["refit", "recalibrate_batchnorm"], ["recalibrate_batchnorm", "refit"]):
        model = tdecomp.decompose(plain, "svd", rank={"8": 3}, **QUIET).model
        found = run_steps(recovery_steps(names), model, original, data)
        assert [recovery.step for recovery in found] == names
        assert found[0].error_after == found[1].error_before
        states.append(state(model))
    assert not equal(*states)


def test_the_original_runs_once_for_the_errors_of_all_steps():
    original, batches = mlp(), vectors()
    model, calls = decomposed(original), []

    def forward(model, batch):
        if model is original and not torch.is_grad_enabled():
            calls.append(len(batch))
        return model(batch)

    def calls_of(steps):
        calls.clear()
        run_steps(steps, model, original, batches_or_moments(batches, forward=forward, **QUIET))
        return len(calls)

    once = calls_of([RecalibrateBatchnorm()])
    assert once == 1  # the batch that is held out
    assert calls_of([RecalibrateBatchnorm()] * 3) == once


def test_in_place_with_an_optimizer():
    model, batches = mlp(), vectors()
    options = {"rank": 3, "data": batches, "recover": ALL, **QUIET}
    wanted = tdecomp.decompose(model, "svd", **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = tdecomp.decompose(model, "svd", inplace=True, optimizers=optimizer, **options)
    assert result.model is model
    assert equal(state(model), state(wanted.model))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert all(p.grad is None for p in model.parameters())
    before = state(model)
    model(batches[0]).square().mean().backward()
    optimizer.step()
    assert not equal(before, state(model))


@pytest.mark.parametrize("step", NAMES)
def test_in_place_all_or_nothing(step):
    model = nn.Sequential(*mlp(), nn.BatchNorm1d(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    good = vectors(5)
    plan = tdecomp.plan(model, "svd", rank=3, **QUIET)
    calls = []

    def forward(model, batch):  # fails in the step, after the calibration
        calls.append(batch)
        if len(calls) > len(good) + 2:
            raise RuntimeError("out of something")
        return model(batch)

    with (
        unchanged(model, optimizer),
        pytest.raises(
            ValueError,
            match=rf"(recover|{step}): the model rejected.*out of something",
        ),
    ):
        tdecomp.apply(
            model, plan, data=good, forward=forward, inplace=True, optimizers=optimizer,
            recover=step, **QUIET,
        )  # fmt: skip


def test_nothing_decomposed_is_nothing_to_recover():
    model, batches = mlp(), vectors()
    with unchanged(model):
        result = tdecomp.decompose(
            model, "svd", rank=tdecomp.Budget(macs=1.0), example_inputs=batches[0], data=batches,
            recover=ALL, **QUIET,
        )  # fmt: skip
    assert equal(state(result.model), state(model))
    assert result.report.summary().count("no layer was decomposed") == 3


def test_how_the_model_is_called_reaches_every_step():
    model, batches = mlp(), vectors(5)
    wanted = tdecomp.decompose(model, "svd", rank=3, data=batches[:2], recover=ALL, **QUIET)
    named = Data([{"image": x} for x in batches], max_batches=2)
    found = tdecomp.decompose(
        model, "svd", rank=3, data=named, forward=lambda m, b: m(b["image"]), recover=ALL, **QUIET
    )
    assert equal(state(wanted.model), state(found.model))


def test_augment_of_the_data_reaches_the_steps_that_vary():
    seen = []

    def noted(batch, generator):
        seen.append(len(batch))
        return tdecomp.flip_and_shift(batch, generator)

    original, model = convnet(), decomposed(convnet(), "lowrank")
    data = batches_or_moments(Data(images(), augment=noted), **QUIET)
    run_steps([RecalibrateBatchnorm()], model, original, data)
    assert not seen
    run_steps([Distill(steps=3)], model, original, data)
    assert seen


# Their results as plain data --------------------------------------------------------------------


def test_a_result_as_plain_data():
    original, batches = mlp(), vectors()
    recovery = tdecomp.refit(decomposed(original), original, batches, **QUIET)
    plain = json.loads(json.dumps(recovery.to_dict(), allow_nan=False))
    assert plain["step"] == "refit"
    assert plain["error_after"] == recovery.error_after < plain["error_before"]
    assert plain["layers"] == {name: list(errors) for name, errors in recovery.layers.items()}
    assert plain["notes"] == list(recovery.notes)
    alone = tdecomp.recalibrate_batchnorm(decomposed(original), batches, **QUIET).to_dict()
    assert json.loads(json.dumps(alone, allow_nan=False))["error_before"] is None
