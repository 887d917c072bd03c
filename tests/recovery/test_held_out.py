"""Errors of whole models on samples that are held out, and changes that are taken back."""

import copy

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp import Data
from tdecomp.calibration.passes import batches_for
from tdecomp.recovery.attempt import Attempt
from tdecomp.recovery.held_out import HeldOut
from tests.recovery.networks import QUIET, mlp, vectors, whole


def held_out(original, data, **options):
    return HeldOut(original, batches_for("test", data, progress=False, **options))


def noisy(model, size=0.1):
    """The model with noise on its weights."""
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return twin


def share(mine, wanted):
    """The lost share of the variance, from its definition."""
    mine, wanted = mine.detach().double(), wanted.detach().double()
    return float((mine - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def test_errors_are_those_of_the_batches_that_are_held_out():
    original, batches = mlp(), vectors(6)
    model, held = noisy(original), held_out(original, batches)
    x = batches[1]
    unbiased = len(x) / (len(x) - 1)
    assert held.error(model) * unbiased == pytest.approx(share(model(x), original(x)), rel=1e-5)
    assert held.samples == len(x)
    apart = (model(x) - original(x)).square().sum(dim=1)
    assert torch.allclose(held.lost(model), apart.double(), rtol=1e-4)


def test_nothing_held_out_is_the_error_of_all_without_an_interval():
    original, batches = mlp(), vectors(3)
    model, held = noisy(original), held_out(original, whole(batches))
    found, x = held.estimate(held.lost(model)), torch.cat(batches)
    assert found.value == pytest.approx(share(model(x), original(x)), rel=1e-5)
    assert found.se is None
    assert held.samples == 0


def test_samples_of_a_batch_count_as_one_where_the_outputs_do_not_tell_them_apart():
    original, batches = mlp(), vectors(20)
    mixed = lambda model, x: model(x).reshape(-1)  # noqa: E731
    held = held_out(original, batches, forward=mixed)
    assert len(held.lost(noisy(original))) == held.samples == 4


def sequences(count=40, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, length, 16, generator=generator)
    mask = torch.rand(count, length, generator=generator) < 0.6
    mask[5] = False
    return x, mask


def by_input(model, batch):
    return model(batch["x"])


def test_rows_that_do_not_count_are_in_no_error():
    original = mlp()
    model = noisy(original)
    x, mask = sequences()
    batch = {"x": x, "mask": mask}
    spoilt = {"x": torch.where(mask[..., None], x, torch.nan), "mask": mask}
    errors = [
        held_out(original, Data([b], mask=lambda b: b["mask"], held_out=0), forward=by_input).error(
            model
        )
        for b in (batch, spoilt)
    ]
    assert errors[0] == pytest.approx(share(model(x[mask]), original(x[mask])), rel=1e-5)
    assert errors[1] == pytest.approx(errors[0])


@pytest.mark.parametrize("steps", [False, True], ids=["samples", "steps"])
def test_a_mask_leaves_samples_the_unit_of_chance(steps):
    original, (x, mask) = mlp(), sequences()
    mask = mask if steps else mask.any(1)
    held = held_out(
        original, Data({"x": x, "mask": mask}, mask=lambda b: b["mask"]), forward=by_input
    )
    lost = held.lost(noisy(original))
    assert len(lost) == held.samples in (7, 8)  # of 8, as one may have no row that counts


def attempted(size, batches, change):
    original = mlp()
    model = noisy(original, size)
    before = copy.deepcopy(model.state_dict())
    attempt = Attempt(model, held_out(original, batches))
    with torch.no_grad():
        change(model, original)
    recovery = attempt.finish("step", {"0": (0.5, 0.25)}, ["a note"])
    kept = any(not torch.equal(before[k], v) for k, v in model.state_dict().items())
    return recovery, kept


def to_the_original(model, original):
    model.load_state_dict(original.state_dict())


def away(model, _):
    for p in model.parameters():
        p.mul_(0.9)


def test_what_surely_helps_stays():
    recovery, kept = attempted(0.1, vectors(6), to_the_original)
    assert kept
    assert recovery.error_after == 0 < recovery.error_before
    assert recovery.gain_se < recovery.error_before
    assert recovery.layers == {"0": (0.5, 0.25)}
    assert recovery.notes == ("a note",)


@pytest.mark.parametrize("batches", [vectors(6), [vectors(1, 2)[0]]], ids=["worse", "one sample"])
def test_what_may_be_chance_is_taken_back(batches):
    change = away if len(batches) > 1 else to_the_original
    recovery, kept = attempted(0.01, batches, change)
    assert not kept
    assert recovery.error_after == recovery.error_before
    assert recovery.layers == {"0": (0.5, 0.5)}
    assert "is no sure gain" in str(recovery)
    assert ("a single sample is held out" in str(recovery)) == (len(batches) == 1)


def test_how_much_data_would_tell_is_said():
    def first_layer(model, original):
        model[0].load_state_dict(original[0].state_dict())
        model[4].weight.add_(0.02 * torch.randn(8, 20, generator=torch.Generator().manual_seed(1)))

    recovery, kept = attempted(0.02, vectors(2, 4), first_layer)
    assert not kept
    assert ": 2 times as much data may tell" in recovery.notes[-1]


def test_what_makes_the_fitted_samples_worse_is_taken_back_where_none_are_held_out():
    recovery, kept = attempted(0.01, whole(vectors(2)), away)
    assert not kept
    assert recovery.error_after == recovery.error_before
    assert "is no sure gain" in str(recovery)


def test_without_samples_held_out_it_says_so():
    recovery, kept = attempted(0.1, whole(vectors(2)), to_the_original)
    assert kept
    assert (recovery.error_se, recovery.gain_se, recovery.samples) == (None, None, 0)
    assert recovery.notes[-1] == "nothing was held out: errors are of what was fitted to"


def test_what_is_said_of_an_error():
    original = mlp()
    model = tdecomp.decompose(original, "svd", rank=3, **QUIET).model
    recovery = tdecomp.refit(model, original, vectors(20), **QUIET)
    assert 0 < recovery.error_se < recovery.error_margin < 3 * recovery.error_se
    assert f"{recovery.error_after:.4g} ± {recovery.error_margin:.2g} (95%, " in str(recovery)
    plain = recovery.to_dict()
    assert {"error_se", "error_margin", "gain_se", "samples"} <= plain.keys()
    assert "model" not in plain


class Restless:
    """Other samples at the same place in each pass."""

    def __init__(self):
        self.seed = 0

    def __iter__(self):
        self.seed += 1
        return iter(vectors(6, seed=self.seed))


def test_batches_that_differ_from_pass_to_pass_are_told():
    original = mlp()
    model = tdecomp.decompose(original, "svd", rank=3, **QUIET).model
    words = "batches differ from pass to pass: errors are too low if these are other samples"
    assert words in tdecomp.refit(model, original, Restless(), **QUIET).notes
    assert words not in tdecomp.refit(model, original, vectors(6), **QUIET).notes


def test_a_scalar_output_and_an_original_that_is_missing():
    batches = vectors(4)
    original = nn.Sequential(mlp(), nn.Flatten(0))
    held = held_out(original, batches, forward=lambda model, x: model(x).mean())
    assert len(held.lost(noisy(original))) == 1
    assert torch.isnan(held_out(None, batches).lost(original)).all()


def test_an_embedding_as_wide_as_the_sequences_are_long_has_no_steps():
    original, (x, mask) = nn.Linear(16, 7), sequences()
    batch = {"x": x, "mask": mask}
    data = Data([batch], mask=lambda b: b["mask"], held_out=0)
    mean = lambda model, b: model(b["x"]).mean(1)  # noqa: E731
    model, held = noisy(original), held_out(original, data, forward=mean)
    assert held.error(model) == pytest.approx(share(mean(model, batch), mean(original, batch)))
