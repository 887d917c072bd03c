"""What is kept of layers' inputs in samples that are held out, and the errors told by it."""

import dataclasses

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp import Data
from tests.decomposers.oracle import distance

QUIET = {"progress": False}


def convolutions(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(),
            nn.Conv2d(8, 6, 3, stride=2, groups=2, bias=False), nn.Flatten(), nn.Linear(54, 5),
        ).eval()  # fmt: skip


def images(count, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) + 0.5


def inputs_of(model, x):
    """The input of each layer that can be decomposed."""
    found = {}
    with torch.no_grad():
        for name, layer in model.named_children():
            found[name], x = x, layer(x)
    return {name: found[name] for name in ("0", "2", "4")}


def lost(chain, layer, x):
    """The lost share of the variance of a layer's outputs."""
    with torch.no_grad():
        y, z = (m(x).movedim(1, -1).flatten(0, -2).double() for m in (layer, chain))
    return float((z - y).square().sum() / (y - y.mean(0)).square().sum())


def test_a_row_s_error_is_that_of_the_batches_that_are_held_out():
    model, batches = convolutions(), list(images(40).split(8))
    result = tdecomp.decompose(model, "auto", rank=2, data=batches, allow_expansion=True, **QUIET)
    for name, x in inputs_of(model, batches[1]).items():
        layer, row = model.get_submodule(name), result.report[name]
        error = lost(result.model.get_submodule(name), layer, x)
        rows = {"0": 8 * 64, "2": 8 * 9, "4": 8}[name]
        assert row.output_error * rows / (rows - 1) == pytest.approx(error, rel=1e-3), name
        assert 0 < row.output_error_se < row.output_error_margin
    assert "errors are of 8 of 40 samples, held out from fits" in result.report.summary()
    assert f"± {row.output_error_margin:.4f}" in str(result.report)


def test_the_interval_holds_the_error_on_new_inputs():
    model, held = convolutions(), 0
    new = inputs_of(model, images(1000, seed=99))
    for seed in range(20):
        result = tdecomp.decompose(model, "svd", rank=2, data=images(30, seed), **QUIET)
        row = result.report["4"]
        truth = lost(result.model[4], model[4], new["4"])
        assert row.output_error != pytest.approx(truth, rel=1e-3)
        held += abs(row.output_error - truth) <= row.output_error_margin
    assert held >= 17


def test_nothing_held_out_is_the_error_of_what_was_fitted_to():
    model, x = convolutions(), images(30)
    data = Data(x, held_out=0)
    result = tdecomp.decompose(model, "svd", rank=2, data=data, **QUIET)
    row = result.report["4"]
    assert row.output_error == pytest.approx(
        lost(result.model[4], model[4], inputs_of(model, x)["4"]), rel=1e-3
    )
    assert (row.output_error_se, row.output_error_margin) == (None, None)
    assert "nothing is held out: errors are of what was fitted to" in result.report.summary()
    assert tdecomp.calibrate(model, data, **QUIET)["4"].held is None


def test_what_is_held_out_is_in_no_moment():
    batches = list(images(24).split(8))
    moments = tdecomp.calibrate(convolutions(), batches, **QUIET)
    fit = tdecomp.calibrate(convolutions(), Data([batches[0], batches[2]], held_out=0), **QUIET)
    assert moments.samples == fit.samples == 16
    assert torch.equal(moments["0"].matrix, fit["0"].matrix)
    assert moments["0"].held.owners.unique().tolist() == [*range(8)]


@pytest.mark.parametrize("size", [1, 5, 200])
def test_no_more_are_kept_than_are_useful_and_none_is_preferred(size):
    batches = [batch for part in images(400).split(size) for batch in (part, part)]
    held = tdecomp.calibrate(convolutions(), Data(batches, held_out=0.5), **QUIET)["0"].held
    assert 512 <= len(held.owners) <= 1024
    counts = held.owners.bincount()
    assert len(counts) == 400
    assert counts.double().var() < 3 * counts.double().mean()
    assert abs(counts[:200].sum() - counts[200:].sum()) < 0.25 * len(held.owners)


def test_rows_that_do_not_count_are_not_kept():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 7, 6, generator=generator)
    mask = torch.rand(20, 7, generator=generator) < 0.5
    batch = {"x": torch.where(mask[..., None], x, torch.nan), "mask": mask}
    data = Data([batch, batch], mask=lambda b: b["mask"])
    moments = tdecomp.calibrate(
        nn.Sequential(nn.Linear(6, 4)), data, forward=lambda model, b: model(b["x"]), **QUIET
    )
    held = moments["0"].held
    assert torch.equal(held.owners, mask.nonzero()[:, 0])
    assert distance(held.rows[0], x[mask]) == 0


def test_they_are_saved_moved_and_merged(tmp_path):
    halves = [tdecomp.calibrate(convolutions(), images(20, seed), **QUIET) for seed in range(2)]
    both = halves[0] + halves[1]
    assert both["2"].held.owners.unique().tolist() == [*range(8)]
    both.save(tmp_path / "moments")
    loaded = tdecomp.Moments.load(tmp_path / "moments")["2"].to(torch.device("cpu"))
    for part in ("rows", "owners"):
        assert torch.equal(getattr(loaded.held, part), getattr(both["2"].held, part))
    without = tdecomp.calibrate(convolutions(), Data(images(9), held_out=0), **QUIET)
    assert (without + halves[0])["0"].held is not None


@pytest.mark.parametrize("change", [
    {"rows": lambda rows: rows[:, :-1]}, {"rows": lambda rows: rows * torch.nan},
    {"owners": lambda owners: owners.double()}, {"owners": lambda owners: owners[:0]},
    {"owners": lambda owners: owners[None]},
], ids=["shape", "nan", "dtype", "none", "dimensions"])  # fmt: skip
def test_damaged_ones_are_refused(change, tmp_path):
    moments = tdecomp.calibrate(convolutions(), images(20), **QUIET)
    held = moments["0"].held
    damaged = {part: spoil(getattr(held, part)) for part, spoil in change.items()}
    moments.layers["0"] = dataclasses.replace(
        moments["0"], held=dataclasses.replace(held, **damaged)
    )
    moments.save(tmp_path / "moments")
    with pytest.raises(ValueError, match="damaged: layer '0': held_"):
        tdecomp.Moments.load(tmp_path / "moments")


def test_held_out_inputs_that_are_not_finite_are_refused():
    good, bad = images(8), images(8) * torch.nan
    with pytest.raises(ValueError, match=r"layer '0' .*hold NaN or infinities"):
        tdecomp.calibrate(convolutions(), [good, bad, good], **QUIET)
