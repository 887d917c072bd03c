"""Decomposing with data: what a user sees of it, from `decompose` to the report's rows."""

import copy
from dataclasses import replace
from types import NoneType

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.calibration.calibrate import calibrate
from tdecomp.calibration.layer_moments import LayerMoments
from tdecomp.decomposers.fit_layer import fit_layer
from tdecomp.decomposers.registry import get_decomposer
from tdecomp.layers.spec import LayerSpec
from tests.decomposers.oracle import SAME_PADDING_OF_EVEN_KERNELS, distance
from tests.geometries import GEOMETRIES, case
from tests.unchanged import unchanged

PLAIN = [g for g in GEOMETRIES if not g.spec.transposed]
METHODS = ("svd", "lowrank", "spatial", "tucker2", "cp", "cp-separable")


def model(seed=0):
    """Dense, grouped and pointwise convolutions, with and without a bias, and a Linear."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False),
            nn.ReLU(),
            nn.Conv2d(8, 10, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(90, 6),
        )


def images(count=40, seed=1):
    x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return x * torch.tensor([2.0, 0.5, 1.0])[:, None, None] + 0.5


def whole(batches):
    """Data of which nothing is held out: errors are those of all batches."""
    return tdecomp.Data(batches, held_out=0)


def decomposed(methods, data, **options):
    data = data if isinstance(data, (tdecomp.Moments, NoneType)) else whole(data)
    return tdecomp.decompose(
        model(), methods, rank=2, data=data, allow_expansion=True, progress=False, **options
    )


def measured(original, chain, x, bias):
    """``E‖y − ỹ‖² / Var(y)``, and how far the means are apart."""
    with torch.no_grad():
        y, approximated = (
            out.movedim(1, -1).reshape(-1, out.shape[1]).double() for out in (original(x), chain(x))
        )
    variance = (y - y.mean(dim=0)).square().sum(dim=1).mean()
    gone = y - approximated
    if bias:
        assert gone.mean(dim=0).norm() < 1e-4 * variance.sqrt()
    return (gone.square().sum(dim=1).mean() / variance).item()


def inputs_of(layers, x):
    """The input of each layer of a Sequential."""
    seen = []
    with torch.no_grad():
        for layer in layers:
            seen.append(x.clone())
            x = layer(x)
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_output_error_of_a_row_is_the_measured_one(method):
    original, x = model(), images()
    result = decomposed(list({method: 0, "svd": 0}), [x[:17], x[17:]])
    inputs = inputs_of(original, x)
    done = [row for row in result.report if row.method is not None]
    assert len(done) == (2 if method == "svd" else 4)
    for row in done:
        at = int(row.name)
        layer = original[at]
        error = measured(layer, result.model[at], inputs[at], layer.bias is not None)
        assert row.output_error == pytest.approx(error, rel=1e-3)
        assert row.weight_error is not None


@pytest.mark.filterwarnings(SAME_PADDING_OF_EVEN_KERNELS)
def test_every_geometry_is_fitted_to_its_data():
    for geometry in PLAIN:
        with case(geometry):
            check_fit_to_data(geometry)


def check_fit_to_data(geometry):
    layer, x = geometry.layer(), geometry.input(9).relu() + 0.2
    method = "lowrank" if geometry.spec.ndim else "svd"
    result = tdecomp.decompose(
        nn.Sequential(layer), method, rank=1, data=whole([x]), allow_expansion=True, progress=False
    )
    row = result.report["0"]
    error = measured(layer, result.model[0], x, geometry.spec.bias)
    assert row.output_error == pytest.approx(error, rel=1e-6, abs=1e-9)
    by_weight = tdecomp.decompose(
        nn.Sequential(layer), method, rank=1, allow_expansion=True, progress=False
    ).model[0]
    if geometry.spec.bias:  # what a bias can take up does not count
        with torch.no_grad():
            gap = (layer(x) - by_weight(x)).movedim(1, -1).reshape(-1, layer.weight.shape[0])
            by_weight[-1].bias += gap.mean(dim=0)
    assert error <= measured(layer, by_weight, x, geometry.spec.bias) + 1e-9


@pytest.mark.parametrize("method", ["lowrank", "tucker2", "spatial", "cp", "cp-separable"])
def test_data_lowers_the_output_error(method):
    moments = calibrate(model(), whole([images()]), progress=False)
    by_data = decomposed(method, moments).report
    by_weight = decomposed(method, None)
    for row in by_data:
        if row.method is None:
            continue
        at = int(row.name)
        kernel = _kernel(by_weight.model[at])
        weight, seen = model()[at].weight, moments[row.name]
        error, _ = seen.lost(weight, weight.detach() - kernel, seen.second_moments())
        assert row.output_error <= error * (1 + 1e-6)
        assert by_weight.report[row.name].output_error is None


def _kernel(chain):
    return chain.decomposer.factors_in(chain).to_kernel()


def test_batches_and_their_moments_give_the_same():
    x = images()
    moments = calibrate(model(), whole([x]), progress=False)
    by_batches, by_moments = decomposed("lowrank", [x]), decomposed("lowrank", moments)
    for one, other in zip(by_batches.report, by_moments.report, strict=True):
        assert (one.output_error is None) == (other.output_error is None)
        assert (one.output_error or 0.0) == pytest.approx(other.output_error or 0.0, rel=1e-6)
        assert one.note == other.note
    for a, b in zip(by_batches.model.parameters(), by_moments.model.parameters(), strict=True):
        assert torch.equal(a, b)
    plan = tdecomp.plan(
        model(), "lowrank", rank=2, data=moments, allow_expansion=True, progress=False
    )
    for data in (moments, whole([x]), whole(iter([x]))):
        applied = tdecomp.apply(model(), plan, data=data, progress=False)
        assert distance(applied.model(x), by_moments.model(x)) < 1e-6
    without = tdecomp.apply(model(), plan, progress=False)
    assert without.report["0"].output_error is None
    assert distance(without.model(x), by_moments.model(x)) > 1e-3


def test_moments_that_were_merged_or_saved_serve_as_well(tmp_path):
    x = images()
    halves = [calibrate(model(), whole([part]), progress=False) for part in x.split(20)]
    (halves[0] + halves[1]).save(tmp_path / "moments")
    loaded = tdecomp.Moments.load(tmp_path / "moments")
    assert (
        distance(decomposed("tucker2", loaded).model(x), decomposed("tucker2", x).model(x)) < 1e-3
    )


def test_model_and_moments_are_left_alone():
    original, x = model().train(), images()
    moments = calibrate(original, whole([x]), progress=False)
    before = copy.deepcopy(moments.layers)
    with unchanged(original):
        tdecomp.decompose(
            original, "tucker2", rank=2, data=moments, allow_expansion=True, progress=False
        )
        tdecomp.decompose(original, "lowrank", rank=2, data=whole([x]), progress=False)
    for name, layer in moments.items():
        assert torch.equal(layer.mean, before[name].mean)


def test_full_rank_changes_nothing():
    original, x = model(), images()
    result = tdecomp.decompose(
        original,
        ["lowrank", "svd"],
        rank=tdecomp.Ratio(1.0, of="rank"),
        data=whole([x]),
        allow_expansion=True,
        progress=False,
    )
    assert all(row.output_error < 1e-9 for row in result.report if row.method)
    assert distance(result.model(x), original(x)) < 1e-5


# Notes -------------------------------------------------------------------------------------------


def test_row_says_that_there_were_few_samples():
    result = decomposed(["lowrank", "svd"], [images(7)])
    assert result.report["7"].note.endswith("fewer samples (7) than fan_in (90)")
    assert "fewer samples" not in (result.report["0"].note or "")
    assert 0 < result.report["7"].output_error < 1
    assert all(torch.isfinite(p).all() for p in result.model.parameters())


def test_row_says_that_a_transposed_convolution_has_no_moments():
    up = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 3))
    result = tdecomp.decompose(
        up, "lowrank", rank=2, data=whole([images(4)]), allow_expansion=True, progress=False
    )
    assert result.report["1"].method == "lowrank"
    assert result.report["1"].output_error is None
    assert "fitted by its weights: no moments of a ConvTranspose2d" in result.report["1"].note
    assert result.report["0"].output_error > 0


def test_row_says_that_no_batch_reached_the_layer():
    layers = nn.ModuleDict({"used": nn.Linear(9, 9), "spare": nn.Linear(9, 9)})
    result = tdecomp.decompose(
        layers,
        "svd",
        rank=2,
        data=whole([torch.randn(20, 9, generator=torch.Generator().manual_seed(0))]),
        forward=lambda m, x: m["used"](x),
        progress=False,
    )
    assert "fitted by its weights: no batch reached it" in result.report["spare"].note
    assert result.report["spare"].output_error is None
    assert result.report["used"].output_error > 0


# Layers that make it hard ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    x = images().to(dtype)
    result = tdecomp.decompose(
        model().to(dtype), "lowrank", rank=2, data=whole([x]), allow_expansion=True, progress=False
    )
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    usual = decomposed("lowrank", [images()])
    for row in usual.report:
        if row.method:
            assert result.report[row.name].output_error == pytest.approx(row.output_error, rel=0.1)


@pytest.mark.parametrize("rank", [8, 4])
@pytest.mark.parametrize("method", ["cp", "cp-separable", "tucker2", "spatial", "lowrank"])
def test_inputs_that_depend_on_each_other(method, rank):
    """Four directions in eight channels: rounding makes such moments slightly indefinite."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, padding=1))
        x = torch.randn(64, 4, 8, 8)
    rank = {"cp": 8 * rank, "cp-separable": 6 * rank, "spatial": 3 * rank}.get(method, rank)
    result = tdecomp.decompose(
        layers, method, rank={"1": rank}, data=whole([x]), allow_expansion=True, progress=False
    )
    assert 0 <= result.report["1"].output_error < 0.6
    assert all(torch.isfinite(p).all() for p in result.model.parameters())


@pytest.mark.parametrize("method", ["cp", "tucker2", "spatial", "lowrank"])
def test_inputs_of_a_large_mean(method):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Conv2d(6, 8, 3))
        x = torch.randn(50, 6, 8, 8) + 300.0
    near = tdecomp.decompose(layers, method, rank=4, data=whole([x - 300.0]), progress=False)
    far = tdecomp.decompose(layers, method, rank=4, data=whole([x]), progress=False)
    error = near.report["0"].output_error
    assert far.report["0"].output_error == pytest.approx(error, rel=1e-2)
    assert measured(layers[0], far.model[0], x, bias=True) == pytest.approx(error, rel=5e-2)


def test_dead_layer():
    class Dead(nn.Module):
        def forward(self, x):
            return 0 * x

    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Sequential(Dead(), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    for method in ("lowrank", "tucker2", "cp"):
        result = tdecomp.decompose(
            layers, method, rank=2, data=whole([images(8)]), allow_expansion=True, progress=False
        )
        by_weight = tdecomp.decompose(layers, method, rank=2, allow_expansion=True, progress=False)
        row = result.report["1"]
        assert row.output_error == 0.0
        # Nothing is known of its inputs, so that the weights decide.
        assert row.weight_error == pytest.approx(by_weight.report["1"].weight_error, rel=1e-2)


# Fine-tuning -------------------------------------------------------------------------------------


def losses_of_fine_tuning(student, teacher, steps=60, lr=1e-3):
    """Mean squared errors against the original's outputs, step by step."""
    optimizer = torch.optim.Adam(student.parameters(), lr=lr)
    x = images(32, seed=2)
    with torch.no_grad():
        wanted = teacher(x)
    losses = []
    for _ in range(steps):
        loss = (student(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses) / wanted.var().item()


def wide():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(12, 12, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(12, 12, 3, padding=1),
        )


@pytest.mark.parametrize("method", ["cp", "cp-separable"])
def test_fine_tuning_of_chains_fitted_to_data_is_stable(method):
    """Components come out balanced; with all norm in one factor the same steps destroy them."""
    teacher = wide()
    student = tdecomp.decompose(
        teacher, method, rank=12, data=whole([images(64)]), allow_expansion=True, progress=False
    ).model
    for chain in (student[0], student[2], student[4]):
        (factors,) = _factors(chain)
        norms = torch.stack([factor.norm(dim=0) for factor in factors.factors])
        assert distance(norms, norms.mean(dim=0).expand_as(norms)) < 1e-5
    lopsided = copy.deepcopy(student)
    with torch.no_grad():
        for chain in (lopsided[0], lopsided[2], lopsided[4]):
            chain[0].weight /= 100
            chain[1].weight /= 100
            chain[-1].weight *= 100**2
    losses = losses_of_fine_tuning(student, teacher)
    assert losses.max() < 1.5 * losses[0]
    assert losses[-1] < 0.9 * losses[0]
    diverging = losses_of_fine_tuning(lopsided, teacher)
    assert diverging[0] == pytest.approx(losses[0].item(), rel=1e-2)
    assert diverging.max() > 10 * losses.max()


def _factors(chain):
    return chain.decomposer.factors_in(chain).groups


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["cp", "cp-separable"])
def test_a_fit_to_data_is_no_worse_than_one_to_the_weights_after_rounding(method, dtype):
    # Both are exact before it: what is left is rounding, from which terms that cancel suffer most.
    spec, chosen = LayerSpec.of(nn.Conv2d(6, 6, 3)), get_decomposer(method)
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        modes = [torch.randn(size, 3, generator=g) for size in (6, 6, 3, 3)]
        model = nn.Sequential(nn.Conv2d(6, 6, 3)).requires_grad_(False)
        model[0].weight.copy_(torch.einsum("or,ir,hr,wr->oihw", *modes))
        x = torch.randn(4, 6, 8, 8, generator=g) * torch.logspace(0, -3, 6)[:, None, None] + 3
        seen = tdecomp.calibrate(model, whole([x]), gradients=False, progress=False).layers["0"]
        seen = replace(seen, samples=None)  # so that errors are in the very norm of the fits
        weight = model[0].weight.to(dtype)
        by_data = fit_layer(weight, spec, chosen, 3, seen).output_error
        by_weights = fit_layer(weight, spec, chosen, 3).factors.to(torch.float64).to_kernel()
        lost, _ = seen.lost(weight, weight.double() - by_weights, seen.second_moments())
        assert by_data <= lost * (1 + 1e-9)


@pytest.mark.parametrize("method", ["tucker2", "spatial", "cp", "lowrank"])
@pytest.mark.parametrize("channels", [24, 64])
def test_a_fit_to_few_patches_stays_near_the_weights(method, channels):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(channels, 32, 3, padding=1)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
    # Smooth images, whose finest directions are hardly there: 6 of them, of 2×2 positions.
    mix = torch.randn(channels, channels, generator=generator)
    mix = mix * torch.logspace(0, -6, channels)[:, None]
    images = torch.einsum("bchw,cd->bdhw", torch.randn(6, channels, 2, 2, generator=generator), mix)
    model = nn.Sequential(layer)
    data = tdecomp.Data([images], held_out=0, augment=None)
    row = tdecomp.decompose(model, method, rank=0.3, data=data, progress=False).report["0"]
    assert row.method == method
    assert row.weight_error < 2


@pytest.mark.parametrize(
    "method, rank", [("spatial", 10), ("tucker2", (4, 8)), ("lowrank", 6), ("cp", 20)]
)
def test_fits_to_few_samples_lean_less_on_them_and_lose_less_of_others(method, rank):
    chosen, gains = get_decomposer(method), []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        spec = LayerSpec.of(nn.Conv2d(8, 16, 3, bias=False))
        weight = torch.randn(16, 8, 3, 3, generator=generator)
        mix = torch.randn(72, 72, generator=generator) * torch.logspace(0, -2, 72)[:, None]
        few, others = (torch.randn(n, 72, generator=generator) @ mix for n in (30, 3000))
        mean = torch.zeros(1, 72).double()
        known = LayerMoments(spec, 30, mean, rows=few[None], samples=30)
        true = LayerMoments(spec, 3000, mean, matrix=(others.T @ others / 3000).double()[None])
        lost = [
            true.output_error(
                weight, fit_layer(weight, spec, chosen, rank, moments).factors.to_kernel()
            )
            for moments in (known, replace(known, samples=None))
        ]
        gains.append(1 - lost[0] / lost[1])
    assert sum(gains) > 0, gains
    assert min(gains) > -0.05


@pytest.mark.parametrize("sizes", [(1024, 1100), (1100, 1024)])
@pytest.mark.parametrize("count", [300, 1500])
def test_large_layers_in_float32_lose_the_least_and_say_so(sizes, count):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layer = nn.Linear(*sizes)
    x = torch.randn(count, sizes[0], generator=generator) * torch.linspace(0.1, 2.0, sizes[0]) + 0.3
    moments = calibrate(layer, whole([x]), progress=False)[""]
    moments = replace(moments, samples=None)  # so that fits lean on all that was seen
    fitted = fit_layer(layer.weight, moments.spec, get_decomposer("svd"), 200, moments)
    centred = (x - x.mean(dim=0)).double()
    outputs = centred @ layer.weight.detach().double().T
    gone = layer.weight.detach().double() - fitted.factors.to_kernel().double()
    variance, lost = outputs.square().sum(), (centred @ gone.T).square().sum()
    assert fitted.output_error == pytest.approx(float(lost / variance), rel=1e-5)
    best = torch.linalg.svdvals(outputs)[200:].square().sum()
    assert float(lost) <= float(best) * (1 + 1e-6) + 1e-9 * float(variance)
