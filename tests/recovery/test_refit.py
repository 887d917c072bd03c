"""Refitting chains to the original's outputs: oracle, guarantees, and what is left alone."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp import Chain, refit
from tests.models import Twice
from tests.recovery.networks import QUIET, convnet, decomposed, images, mlp, vectors, whole
from tests.unchanged import unchanged


def outputs_lost(model, original, batches):
    """The share of the outputs' variance, straight from its definition."""
    with torch.no_grad():
        z = torch.cat([model(x) for x in batches]).double()
        y = torch.cat([original(x) for x in batches]).double()
    return float((z - y).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("method, rank", [("lowrank", 3), ("tucker2", 3), ("cp", 8)])
def test_it_lowers_every_layer_s_error_and_the_model_s(method, rank):
    original, batches = convnet(), images()
    model = decomposed(original, [method, "svd"], rank, data=batches, allow_expansion=True)
    recovery = refit(model, original, whole(batches), **QUIET)
    assert list(recovery.layers) == ["0", "3", "8"]
    for before, after in recovery.layers.values():
        assert after <= before
    assert recovery.error_after < recovery.error_before
    assert recovery.error_before == pytest.approx(outputs_lost(model, original, batches), rel=1e-4)
    assert recovery.error_after == pytest.approx(
        outputs_lost(recovery.model, original, batches), rel=1e-4
    )
    held_out = images(seed=7)
    worse = outputs_lost(recovery.model, original, held_out)
    assert worse < outputs_lost(model, original, held_out)


def test_the_layers_errors_are_those_of_their_outputs_on_their_own_inputs():
    original, batches = mlp(), vectors()
    model = decomposed(original, rank=4)
    recovery = refit(model, original, whole(batches), gradients=False, **QUIET)
    with torch.no_grad():
        x = torch.cat(batches)
        wanted = original[:3](x)
        got = recovery.model[:3](x)
    lost = (got - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert recovery.layers["2"][1] == pytest.approx(float(lost), rel=1e-3)


def blind(seed=0):
    """A model whose last layer hardly looks at half of what the first one says."""
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 6)).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in model:
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
    model[1].weight[:, ::2] *= 1e-3
    return model


def test_outputs_count_as_the_model_feels_them():
    original, batches = blind(), vectors()
    model = decomposed(original, rank={"0": 5})
    weighed = refit(model, original, batches, **QUIET)
    alike = refit(model, original, batches, gradients=False, **QUIET)
    # Rank 5 is nearly enough for the six outputs that are looked at, and for twelve it is not.
    assert weighed.error_after < 0.5 * alike.error_after


def test_models_without_gradients_are_refitted_all_the_same():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, x):
            return self.inner(x.detach()).detach()

    original, batches = Detached(), vectors()
    recovery = refit(decomposed(original), original, batches, **QUIET)
    assert recovery.error_after < recovery.error_before
    assert any("no gradients" in note for note in recovery.notes)


def test_of_full_rank_it_is_least_squares_on_the_inputs_that_the_layer_really_gets():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 6)).double()
    batches = [torch.randn(4000, 16).double()]
    model = decomposed(original, rank={"0": 8, "1": 6}, allow_expansion=True)
    recovery = refit(model, original, whole(batches), **QUIET)
    with torch.no_grad():
        inputs = recovery.model[0](batches[0])
        ones = torch.ones(len(inputs), 1).double()
        wanted = original(batches[0])
        # With bias, as the layer has one; gelsd, as the first chain leaves only 8 dimensions.
        solution = torch.linalg.lstsq(torch.cat([inputs, ones], 1), wanted, driver="gelsd").solution
        best = torch.cat([inputs, ones], 1) @ solution
        got = recovery.model(batches[0])
    assert (got - best).square().sum() < 1e-4 * (wanted - best).square().sum()


def test_a_chain_of_full_rank_gives_the_original_s_outputs_from_other_inputs():
    """The first chain mixes the inputs; the second can undo it, and does."""
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6)).double()
    model = decomposed(original, rank={"1": 6}, allow_expansion=True)
    with torch.no_grad():
        model[0].weight.add_(0.3 * torch.randn(8, 8))
        model[0].bias.add_(1.0)
    batches = [torch.randn(4000, 8).double()]
    recovery = refit(model, original, batches, **QUIET)
    assert recovery.error_before > 0.1
    assert recovery.error_after < 1e-5
    assert recovery.layers["1"][1] < 1e-5


def test_both_models_are_as_they_were_in_whatever_mode():
    original, batches = convnet().train(), images()
    original[3].eval()
    model = decomposed(original, "lowrank").train()
    with unchanged(original, model):
        recovery = refit(model, original, batches, **QUIET)
    assert recovery.model is not model
    assert all(m.training for m in recovery.model.modules())
    assert torch.equal(recovery.model[1].running_mean, original[1].running_mean)


def test_in_place_it_is_the_same_model_with_the_same_parameters():
    original, batches = mlp(), vectors()
    model = decomposed(original)
    copied = refit(model, original, batches, **QUIET)
    before = list(model.parameters())
    with unchanged(original):
        recovery = refit(model, original, batches, inplace=True, **QUIET)
    assert recovery.model is model
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    for mine, other in zip(model.parameters(), copied.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_in_place_all_or_nothing():
    original = mlp()
    model = decomposed(original)
    # Enough samples in front that the error of the whole model never sees the bad batch.
    bad = [*vectors(5), torch.zeros(2, 5)]
    with unchanged(model, original), pytest.raises(ValueError, match="rejected a batch"):
        refit(model, original, bad, inplace=True, **QUIET)
    bad[-1] = torch.full((4, 16), torch.nan)
    with (
        unchanged(model, original),
        pytest.raises(ValueError, match=r"layer '0' \(Linear.*NaN or infinities.*Look at"),
    ):
        refit(model, original, bad, inplace=True, **QUIET)


def test_nan_at_once_is_refused_and_does_not_hang():
    original = mlp()
    with pytest.raises(ValueError, match="NaN or infinities; expected finite"):
        refit(decomposed(original), original, [torch.full((8, 16), torch.nan)], **QUIET)


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: iter(vectors()), ValueError, "more than once, got .*iterator, which yields them"),
        (lambda: (x for x in vectors()), ValueError, "got generator.*expected a DataLoader or a"),
        (list, ValueError, "got no batches; expected at least one"),
        (lambda: [torch.zeros(0, 16)], ValueError, "that holds samples"),
        (lambda: None, TypeError, "expected batches .*, got NoneType"),
        (lambda: tdecomp.calibrate(mlp(), vectors(), **QUIET), ValueError, "got moments; expected"),
    ],
)
def test_batches_that_cannot_be_used(make, error, words):
    original = mlp()
    with pytest.raises(error, match=f"(?s)(refit|data|batches).*{words}"):
        refit(decomposed(original), original, make(), **QUIET)


def test_a_model_that_was_not_decomposed_or_from_another_one():
    original, batches = mlp(), vectors()
    with pytest.raises(ValueError, match=r"no decomposed layer; expected a model that deco"):
        refit(original, original, batches, **QUIET)
    wider = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 22), *list(mlp())[3:])
    with pytest.raises(
        ValueError, match=r"chain '2' replaced Linear\(24→20\), the original has Linear\(24→22\)"
    ):
        refit(decomposed(original), wider, batches, **QUIET)
    with pytest.raises(ValueError, match=r"chain '4' replaced .*the original has no such layer"):
        refit(decomposed(original), mlp()[:4], batches, **QUIET)
    with pytest.raises(ValueError, match=r"chain '0' replaced .*, the original has ReLU; expected"):
        refit(decomposed(original), nn.Sequential(nn.ReLU(), *mlp()), batches, **QUIET)


def test_outputs_of_another_shape_or_no_numbers():
    original, batches = mlp(), vectors()
    model = decomposed(original, include="0")
    other = nn.Sequential(*list(original)[:4], nn.Linear(20, 5))
    with pytest.raises(ValueError, match=r"outputs have shapes \[\(64, 8\)\], the original's"):
        refit(model, other, batches, **QUIET)
    with pytest.raises(ValueError, match=r"no floating-point tensor.*forward="):
        refit(model, original, batches, forward=lambda m, x: m(x).argmax(1), **QUIET)


def test_a_layer_called_several_times_by_several_names():
    torch.manual_seed(0)
    original, batches = Twice(), vectors()
    model = decomposed(original, rank=4)
    recovery = refit(model, original, batches, **QUIET)
    assert recovery.error_after < recovery.error_before
    assert recovery.model.first is recovery.model.again
    assert list(recovery.layers) == ["first"]


def test_calls_that_differ_from_batch_to_batch():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.never = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            return self.b(self.a(x)) if len(x) > 8 else self.a(self.a(x))

    original = Either()
    model = decomposed(original)
    few = torch.randn(8, 16)
    for batches in ([*vectors(), few], [few, *vectors()]):
        recovery = refit(model, original, batches, **QUIET)
        missed = [note for note in recovery.notes if "the first batch does not reach it" in note]
        assert any(note.startswith("'never' (Linear(16→16)) left as it was") for note in missed)


def test_groups_strides_and_three_kinds_of_convolution():
    torch.manual_seed(0)
    original = nn.Sequential(
        nn.Conv2d(4, 12, 3, stride=2, padding=1, groups=2, bias=False),
        nn.ReLU(),
        nn.Conv2d(12, 12, (1, 3), padding="same", padding_mode="circular"),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 8, 4, stride=2),
        nn.Flatten(),
    )
    batches = [torch.randn(24, 4, 9, 9) for _ in range(2)]
    model = decomposed(original, ["lowrank", "tucker2"], rank=2, allow_expansion=True)
    weights = [p.clone() for p in model[4].parameters()]
    recovery = refit(model, original, batches, **QUIET)
    assert recovery.error_after < recovery.error_before
    assert all(after < before for before, after in recovery.layers.values())
    assert list(recovery.layers) == ["0", "2"]
    assert all(map(torch.equal, weights, recovery.model[4].parameters()))
    assert "'4' (" in recovery.notes[0]
    assert "left as it was: no moments of a ConvTranspose2d" in recovery.notes[0]
    assert recovery.notes[0] in str(recovery)


class NoMoments(tdecomp.SVD):
    name = "no-moments"
    fit_to = tdecomp.Decomposer.fit_to


class Silent(tdecomp.SVD):
    name = "silent"
    factors_of = tdecomp.Decomposer.factors_of


@pytest.mark.parametrize(
    "method, known, reason",
    [
        (NoMoments, True, "no-moments uses no moments"),
        (Silent, True, "silent cannot tell the factors of its chain"),
        (Silent, False, "its method 'silent' is not known"),
    ],
)
def test_methods_that_cannot_be_refitted_are_left_with_a_note(method, known, reason):
    original, batches = mlp(), vectors()
    model = decomposed(original, method(), rank=3, include="0")
    model = decomposed(model, "svd", rank=3, include="4")
    if not known:  # as it is loaded from a file where nobody has registered the method
        model[0].decomposer = None
    recovery = refit(model, original, batches, **QUIET)
    assert list(recovery.layers) == ["4"]
    assert reason in recovery.notes[0]
    assert recovery.notes[0].startswith("'0' (Linear(16→24)) left as it was")


FITS = []


@dataclass(frozen=True)
class Noting(tdecomp.CP):
    """A method that is not registered, with options, which notes its fits."""

    name = "noting"

    def fit_to(self, kernel, rank, moment, start=None, **options):
        FITS.append(self)
        return super().fit_to(kernel, rank, moment, start, **options)


def test_a_chain_is_refitted_by_its_own_method_with_its_options():
    original, batches = convnet(), images()
    method = Noting(tol=1e-2, l2_reg=1e-3)
    model = decomposed(original, [method, "svd"], rank=8, allow_expansion=True)
    FITS.clear()
    recovery = refit(model, original, whole(batches), **QUIET)
    assert list(recovery.layers) == ["0", "3", "8"]
    assert len(recovery.notes) == 1  # that nothing was held out
    assert len(FITS) == 2
    assert all((fit.tol, fit.l2_reg) == (1e-2, 1e-3) for fit in FITS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precisions(dtype):
    original, batches = convnet(dtype=dtype), images(dtype=dtype)
    model = decomposed(original, "lowrank", rank=2)
    recovery = refit(model, original, batches, **QUIET)
    assert all(p.dtype is dtype for p in recovery.model.parameters())
    assert recovery.error_after < 0.9 * recovery.error_before
    for before, after in recovery.layers.values():
        assert after <= before


def test_few_samples_do_not_spoil_what_others_get():
    original = convnet()
    model = decomposed(original, "lowrank", rank=4, data=images())
    few = [images()[0][:4]]
    recovery = refit(model, original, few, **QUIET)
    held_out = images(seed=7)
    before, after = (outputs_lost(m, original, held_out) for m in (model, recovery.model))
    assert after < 1.5 * before
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    thin = decomposed(wide, rank=6)
    recovery = refit(thin, wide, [torch.randn(5, 64)], **QUIET)  # by rows: fewer than fan_in
    held_out = [torch.randn(500, 64)]
    assert outputs_lost(recovery.model, wide, held_out) < 1.3 * outputs_lost(thin, wide, held_out)


def test_a_layer_so_wide_that_only_a_sample_of_its_inputs_is_held():
    torch.manual_seed(0)
    original = nn.Sequential(
        nn.Conv1d(2, 96, 3), nn.ReLU(), nn.Conv1d(96, 8, 64, stride=4), nn.ReLU(), nn.Flatten()
    )
    batches = [torch.randn(40, 2, 90).cumsum(2) for _ in range(6)]
    model = decomposed(original, ["lowrank"], rank=2)
    recovery = refit(model, original, batches, **QUIET)
    before, after = recovery.layers["2"]
    assert after < 0.9 * before
    fresh = [torch.randn(200, 2, 90).cumsum(2)]
    assert outputs_lost(recovery.model, original, fresh) < outputs_lost(model, original, fresh)


def test_one_sample_and_outputs_without_a_dimension_for_them():
    original = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 1), nn.Flatten(0))
    model = decomposed(original, rank=2, include="0")
    batches = vectors()
    recovery = refit(model, original, whole(batches), **QUIET)
    assert recovery.error_before == pytest.approx(outputs_lost(model, original, batches), rel=1e-4)
    # Another mean of the outputs is no other error.
    with torch.no_grad():
        original[2].bias.add_(100.0)
        model[2].bias.add_(100.0)
    moved = refit(model, original, whole(batches), **QUIET)
    assert moved.error_before == pytest.approx(recovery.error_before, rel=1e-3)
    alone = refit(model, original, [batches[0][:1]], **QUIET)
    assert alone.error_after <= alone.error_before < 1.0


def test_a_loader_that_shuffles_is_measured_on_the_same_samples():
    original = mlp()
    model = decomposed(original)
    data = torch.utils.data.TensorDataset(torch.cat(vectors(20)))
    loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)
    torch.manual_seed(0)
    recovery = tdecomp.recalibrate_batchnorm(model, loader, original=original, **QUIET)
    assert recovery.error_before == recovery.error_after  # nothing was changed
    refitted = refit(model, original, loader, **QUIET)
    assert refitted.error_after < refitted.error_before


def test_a_model_that_was_decomposed_before():
    original, batches = mlp(), vectors()
    first = decomposed(original, rank=6)
    second = tdecomp.decompose(
        nn.Sequential(first, nn.ReLU(), nn.Linear(8, 8)), "svd", rank=2, data=batches,
        recover="refit", **QUIET,
    )  # fmt: skip
    (recovery,) = second.report.recovery
    assert list(recovery.layers) == ["0.4", "2"]  # "0.4" had been too small to be decomposed at 6
    assert isinstance(second.model[2], Chain)


def test_without_gradients_or_in_inference_mode():
    original, batches = mlp(), vectors()
    model = decomposed(original)
    usual = refit(model, original, batches, **QUIET).model
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            found = refit(model, original, batches, **QUIET).model
        for a, b in zip(usual.parameters(), found.parameters(), strict=True):
            assert torch.allclose(a, b)
            assert b.requires_grad
            assert not b.is_inference()


def test_how_the_model_is_called_and_how_many_batches():
    original, batches = mlp(), vectors(6)
    model = decomposed(original)
    wanted = refit(model, original, batches[:2], **QUIET).model
    named = [{"image": x} for x in batches]
    found = refit(
        model, original, named, forward=lambda m, b: m(b["image"]), max_batches=2, **QUIET
    ).model
    for a, b in zip(wanted.parameters(), found.parameters(), strict=True):
        assert torch.equal(a, b)


class Worse(tdecomp.SVD):
    """Whose fit to data is no fit at all."""

    name = "worse"

    def fit_to(self, kernel, rank, moment, start=None):
        return super().fit_to(kernel, rank, moment, start).scaled(9.0)


def test_a_layer_is_left_as_it_was_where_nothing_is_won():
    original, batches = mlp(), vectors()
    model = decomposed(original, Worse())
    recovery = refit(model, original, batches, **QUIET)
    assert recovery.error_after == recovery.error_before
    for before, after in recovery.layers.values():
        assert after == before
    assert all(map(torch.equal, model.parameters(), recovery.model.parameters()))
