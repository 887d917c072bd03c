"""One pass over batches: what is seen, how the model is called, and that it is left as it was."""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tdecomp
from tdecomp.calibration.accumulator import Accumulator
from tdecomp.calibration.calibrate import calibrate
from tdecomp.calibration.moments import Moments
from tdecomp.model.batches import call_model
from tdecomp.model.opened.scope import opened
from tdecomp.model.sites import find_sites
from tdecomp.runtime.torch_state import exact_passes
from tests.calibration.small_model import Example, check_same, images, small, taken, whole
from tests.models import MODELS, TwoInputs
from tests.unchanged import unchanged

# What is seen ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_sees_what_hooks_see(name, gradients):
    model, batch = MODELS[name].build(), MODELS[name].inputs(6)
    moments = taken(model, [batch], gradients=gradients)
    sums = {}
    with opened(model), exact_passes(), torch.no_grad():
        for site in find_sites(model).values():
            if site.reason is None and not site.spec.transposed:
                own = sums[site.name] = Accumulator(site.spec)
                site.module.register_forward_pre_hook(lambda _, x, own=own: own.add(x[0]))
        call_model(model.eval(), batch)
    assert sums
    assert moments.samples == 6
    assert all((m.gradient is not None) == gradients for m in moments.values())
    without = {name: replace(m, gradient=None) for name, m in moments.items()}
    check_same(Moments(without), Moments({name: own.finish() for name, own in sums.items()}))


def test_layer_called_several_times_sees_every_call():
    model, x = MODELS["twice"].build(), MODELS["twice"].inputs(10)
    moments = taken(model, [x])
    assert list(moments) == ["first"]
    assert moments["first"].count == 30


def test_transposed_and_depthwise_layers_are_not_watched():
    moments = taken(MODELS["cnn"].build(), [MODELS["cnn"].inputs(2)])
    assert list(moments) == ["features.0", "features.3", "features.4", "features.6", "head"]
    assert moments.unreached == ()


def test_layer_that_is_never_reached_is_named():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "spare": nn.Linear(4, 4)})
    moments = taken(model, [torch.ones(3, 4)], forward=lambda m, x: m["used"](x))
    assert list(moments) == ["used"]
    assert moments.unreached == ("spare",)
    assert "1 never reached" in repr(moments)


def test_words_on_the_moments():
    moments = taken(small(), [images(8), images(4)])
    assert repr(moments).startswith("<moments of 3 layers from 12 samples, in 1 of them fewer than")
    assert "0 MiB held" in repr(moments)
    assert moments.peak_bytes > 8 * (27 * 27 + 54 * 54)
    assert len(moments) == 3


# How the model is called -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batches",
    [
        images(),
        [images()],
        list(images().split(3)),
        (images(),),
        [(images(), torch.zeros(8))],
        [[images(), "labels"]],
        [{"input": images()}],
        DataLoader(TensorDataset(images(), torch.zeros(8)), batch_size=3),
        DataLoader(TensorDataset(images()), batch_size=8),
    ],
    ids=["tensor", "list", "several", "tuple", "labels", "list-batch", "dict", "loader", "whole"],
)
def test_batches_of_any_kind(batches):
    check_same(
        taken(small(), batches, gradients=False), taken(small(), [images()], gradients=False)
    )


def test_generator_is_enough_for_one_pass():
    whole = taken(small(), [images()], gradients=False)
    check_same(taken(small(), (x for x in images().split(2)), gradients=False), whole)


def test_model_of_several_inputs_by_position_and_by_keyword():
    model, case = MODELS["tuple"].build(), MODELS["tuple"]
    left, right = case.inputs(40)
    by_position = taken(model, [(left, right, "labels")])
    check_same(by_position, taken(model, [{"right": right, "left": left}]))
    called = taken(model, [Example(right)], forward=lambda m, b: m(right=b.image, left=left))
    check_same(by_position, called)


def test_max_batches_leaves_the_others_alone():
    batches = iter(images().split(2))
    moments = taken(small(), batches, max_batches=3)
    assert moments.samples == 6
    assert len(list(batches)) == 1


@pytest.mark.parametrize("model", [MODELS["encoder"], MODELS["attention"]], ids=["encoder", "mha"])
def test_fast_paths_hide_nothing_and_are_on_again_afterwards(model):
    inside = []

    def forward(model, batch):
        inside.append(torch.backends.mha.get_fastpath_enabled())
        return model(batch)

    assert torch.backends.mha.get_fastpath_enabled()
    moments = taken(model.build(), [model.inputs(4)], forward=forward, max_memory=10**6)
    assert moments.unreached == ()
    assert set(inside) == {False}
    assert torch.backends.mha.get_fastpath_enabled()


def test_bar_over_the_batches(capsys):
    calibrate(small(), whole([images()] * 2))
    assert "calibrate: 100%" in capsys.readouterr().err
    taken(small(), [images()])
    assert capsys.readouterr().err == ""


# Left as it was ----------------------------------------------------------------------------------


class Busy(nn.Module):
    """Changes a buffer, draws random numbers, and has a hook, a gradient and a frozen weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)
        self.register_buffer("calls", torch.zeros(()))
        self.conv.weight.requires_grad_(False)
        self.head.weight.grad = torch.ones(5, 4)
        self.norm.register_forward_hook(lambda *_: None)
        self.head.train()
        self.norm.eval()

    def forward(self, x):
        self.calls += 1
        x = torch.relu_(self.norm(self.conv(x)))
        return self.head(x.mean((2, 3)) + 0.1 * torch.rand(4))


@pytest.mark.parametrize("name", ["busy", "cnn", "encoder", "twice"])
def test_model_is_left_as_it_was(name):
    model = Busy() if name == "busy" else MODELS[name].build()
    batch = images() if name == "busy" else MODELS[name].inputs(4)
    state = torch.get_rng_state()
    with unchanged(model):
        taken(model, [batch, batch])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def fails_late(model, batch):
    model(batch)
    if batch.shape[0] == 1:
        raise RuntimeError("enough")


@pytest.mark.parametrize(
    "batches, options",
    [
        ([images(), torch.ones(2, 7)], {}),
        ([images(), images(1)], {"forward": fails_late}),
        ([images(200), images(1)], {"forward": fails_late}),
        ([torch.full((2, 3, 8, 8), float("nan"))], {}),
        ([torch.ones(2, 7)], {"max_memory": 10**6}),
        ([images()], {"max_memory": 10}),
        ([], {}),
    ],
    ids=["rejected", "late", "late-without-gradients", "nan", "first", "memory", "none"],
)
def test_model_is_left_as_it_was_by_an_error(batches, options):
    model = Busy()
    state = torch.get_rng_state()
    with unchanged(model), pytest.raises(ValueError, match="calibrate: "):
        taken(model, batches, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled()


def test_interrupt_leaves_the_model_as_it_was():
    def interrupted(model, batch):
        model(batch)
        raise KeyboardInterrupt

    model = Busy()
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        taken(model, [images()], forward=interrupted)


def test_batches_are_left_alone():
    x = images()
    model = nn.Sequential(nn.ReLU(inplace=False), nn.Conv2d(3, 4, 3))
    taken(model, [x])
    assert torch.equal(x, images())
    assert not x.requires_grad


@pytest.mark.parametrize("where", ["model", "batch", "all"])
def test_inference_tensors_are_taken(where):
    with torch.inference_mode():
        model, x = small(), images()
    with torch.inference_mode(where == "all"), unchanged(model):
        if where == "batch":
            model = small()
        elif where == "model":
            x = images()
        with (
            pytest.warns(UserWarning, match="no gradients")
            if where != "batch"
            else contextlib.nullcontext()
        ):
            moments = taken(model, [x])
    assert (moments["0"].gradient is not None) == (where == "batch")
    check_same(
        Moments({name: replace(m, gradient=None) for name, m in moments.items()}),
        taken(small(), [images()], gradients=False),
    )


def test_autocast_of_the_caller_rounds_no_sums():
    model, x = nn.Linear(20, 6), torch.randn(90, 20, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu"):
        moments = taken(model, [x])
    check_same(
        Moments({"": replace(moments[""], gradient=None)}), taken(model, [x], gradients=False)
    )


# Bad input ---------------------------------------------------------------------------------------


def test_rejected_batch_names_what_the_model_said():
    with pytest.raises(ValueError, match=r"calibrate: the model rejected a batch .*\(2, 7\)"):
        taken(small(), [torch.ones(2, 7)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("count", [1, 8])
def test_nan_and_infinity_name_the_layer(value, count):
    class Poisoned(nn.Module):
        def forward(self, x):
            return x * value

    model = nn.Sequential(nn.Conv2d(3, 6, 3), Poisoned(), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 2, 3))
    with pytest.raises(ValueError, match=r"layer '2' .*hold NaN or infinities"):
        taken(model, [images(count)])


def test_model_without_layers_and_data_that_are_none():
    with pytest.raises(ValueError, match="no Linear or convolution"):
        taken(nn.ReLU(), [images()])
    with pytest.raises(TypeError, match="data: expected batches"):
        taken(small(), 3)


# Used by a plan ----------------------------------------------------------------------------------


def test_moments_are_no_batches():
    moments = taken(small(), [images()])
    with pytest.raises(ValueError, match="refit runs the model on batches, got moments"):
        tdecomp.decompose(
            small(), "lowrank", rank=2, data=moments, recover="refit", allow_expansion=True
        )


def test_options_reach_the_calibration_of_a_plan(capsys):
    model = TwoInputs()
    batch = Example(torch.ones(2, 20))
    calls = []

    def forward(model, example):
        calls.append(1)
        return model(torch.zeros(2, 12), example.image)

    data = whole(iter([batch] * 5), max_batches=2)
    tdecomp.plan(model, "svd", rank=2, data=data, forward=forward, progress=False)
    assert len(calls) == 2
    assert capsys.readouterr().err == ""
    data = tdecomp.Data([batch], max_memory=1)
    with pytest.raises(ValueError, match="alone needs"):
        tdecomp.plan(model, "svd", rank=2, data=data, forward=forward, progress=False)


# Variants ----------------------------------------------------------------------------------------


def mirrored(batch, _):
    return batch.flip(-1)


def test_layers_that_see_few_patches_see_variants_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    batches = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    plain = calibrate(model, whole(batches), progress=False)
    moments = calibrate(model, whole(batches), augment=mirrored, progress=False)
    # The convolution has 288 patches of 27 entries, the Linear 8 inputs of 144: only it goes on.
    assert (plain["0"].count, moments["0"].count) == (288, 16 * 27)
    assert (plain["3"].count, moments["3"].count) == (8, 4 * 8)
    assert moments.samples == plain.samples == 8
    both = [*batches, *(3 * [x.flip(-1) for x in batches])]
    expected = calibrate(model, whole(both), progress=False)
    torch.testing.assert_close(moments["3"].rows, expected["3"].rows)
    assert torch.equal(moments["3"].gradient, plain["3"].gradient)


def test_batches_that_augment_leaves_alone_are_seen_once():
    model, batches = nn.Linear(12, 2), [torch.randn(4, 12)]
    moments = calibrate(model, whole(batches), augment=tdecomp.flip_and_shift, progress=False)
    assert moments[""].count == 4


def test_variants_need_batches_that_come_again():
    with pytest.raises(ValueError, match="augment goes through the batches more than once"):
        calibrate(nn.Linear(12, 2), iter([torch.randn(4, 12)]), augment=mirrored, progress=False)
