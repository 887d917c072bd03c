"""The moments of one layer are those of its patches, and say what a weight loses on them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tdecomp.calibration.accumulator import Accumulator
from tdecomp.layers.patches import patches
from tdecomp.layers.spec import LayerSpec
from tests.decomposers.oracle import SAME_PADDING_OF_EVEN_KERNELS, distance
from tests.geometries import GEOMETRIES

PLAIN = [g for g in GEOMETRIES if not g.spec.transposed]
pytestmark = pytest.mark.filterwarnings(SAME_PADDING_OF_EVEN_KERNELS)
# About as many images as there are weights, and far fewer.
MANY, FEW = 12, 1


def seen(spec, *inputs):
    sums = Accumulator(spec)
    for x in inputs:
        sums.add(x)
    return sums.finish()


def dense_rows(geometry, x):
    """The patches (groups, positions, fan_in), read off a layer that copies its patches."""
    spec = geometry.spec
    copies = geometry.kind(
        *([spec.in_channels, spec.groups * spec.fan_in] + [spec.kernel_size] * bool(spec.ndim)),
        **{**geometry.options, "bias": False},
        dtype=torch.float64,
    )
    identity = torch.eye(spec.fan_in).double().repeat(spec.groups, 1)
    copies.weight.data = identity.reshape(copies.weight.shape)
    with torch.no_grad():
        y = copies(x)
    return _rows(y, copies).reshape(-1, spec.groups, spec.fan_in).transpose(0, 1)


def _rows(y, layer):
    """Outputs as rows (positions, out)."""
    if isinstance(layer, nn.Linear):
        return y.reshape(-1, y.shape[-1])
    return y.transpose(0, 1).flatten(1).T


def full_matrix(moments):
    """``E[x xᵀ]``, also of moments that are still rows."""
    if moments.matrix is not None:
        return moments.matrix
    return moments.rows.double().transpose(1, 2) @ moments.rows.double() / moments.count


def skewed(x):
    """Inputs of a mean that matters."""
    return x + 0.7 + 0.3 * x.relu()


def check_moments(geometry, batch):
    spec, x = geometry.spec, skewed(geometry.input(batch))
    rows = dense_rows(geometry, x)
    moments = seen(spec, x[: batch // 2], x[batch // 2 :])
    assert moments.count == rows.shape[1]
    assert moments.few == (rows.shape[1] < spec.fan_in)
    assert (moments.rows is not None, moments.matrix is None) == (moments.few, moments.few)
    assert distance(moments.mean, rows.mean(dim=1)) < 1e-12
    assert distance(full_matrix(moments), rows.transpose(1, 2) @ rows / rows.shape[1]) < 1e-12
    assert moments.sizes == (geometry.size,)
    if moments.few:
        assert torch.equal(moments.rows, rows)


@pytest.mark.parametrize("batch", [FEW, MANY])
def test_moments_are_those_of_the_dense_patches(batch):
    for geometry in PLAIN:
        check_moments(geometry, batch)


@pytest.mark.parametrize(
    "layer, x",
    [
        (nn.Linear(300, 2), torch.randn(9000, 300)),
        (nn.Conv2d(60, 2, 3, stride=2, padding=1), torch.randn(9, 60, 64, 64)),
    ],
    ids=["linear", "convolution"],
)
def test_inputs_of_many_slices_with_their_outputs(layer, x):
    layer, x = layer.double(), skewed(x.double())
    spec = LayerSpec.of(layer)
    assert len(list(patches(x, spec))) > 2
    with torch.no_grad():
        y = layer(x)
    sums = Accumulator(spec)
    sums.add(x, y)
    rows = x if spec.ndim == 0 else nn.functional.unfold(x, 3, padding=1, stride=2).mT.flatten(0, 1)
    moments = sums.finish()
    assert moments.count == len(rows)
    assert distance(moments.mean[0], rows.mean(0)) < 1e-12
    assert distance(moments.matrix[0], rows.T @ rows / len(rows)) < 1e-12
    cross, _ = sums.mean_cross()
    assert distance(cross[0], _rows(y, layer).T @ rows / len(rows)) < 1e-12


def test_wide_products_are_made_in_blocks():
    x = skewed(torch.randn(500, 450, generator=torch.Generator().manual_seed(0)).double())
    moments = seen(LayerSpec(450, 3), x)
    assert distance(moments.matrix[0], x.T @ x / 500) < 1e-12


def check_output_error(geometry, batch):
    layer, spec, x = geometry.layer(), geometry.spec, skewed(geometry.input(batch))
    moments = seen(spec, x)
    weight = layer.weight.detach()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)).double()
    other = geometry.layer()
    other.weight.data = weight + 0.3 * noise
    with torch.no_grad():
        y, wrong = (_rows(made(x), made) for made in (layer, other))
    difference = y - wrong
    if spec.bias:
        shift = moments.mean_output(weight - other.weight)
        assert distance(shift, difference.mean(dim=0)) < 1e-10
        difference = difference - shift
    variance = (y - y.mean(dim=0)).square().sum() / len(y)
    assert moments.output_variance(weight) == pytest.approx(variance.item(), rel=1e-9, abs=1e-12)
    second = moments.second_moments()
    error, loss = moments.lost(weight, weight - other.weight, second)
    assert loss is None  # without gradients
    if variance > 1e-12:  # a single output has none
        lost = (difference.square().sum() / len(y) / variance).item()
        assert error == pytest.approx(lost, rel=1e-9)
    assert moments.lost(weight, torch.zeros_like(weight), second)[0] == 0.0
    slopes = torch.randn(40, spec.out_channels, generator=torch.Generator().manual_seed(4)).double()
    # Groups have no loss in common: only each group's own block of the gradients' moment counts.
    moments = replace(moments, gradient=slopes.T @ slopes)
    parts = zip(difference.chunk(spec.groups, 1), slopes.chunk(spec.groups, 1), strict=True)
    weighted = sum((part @ slope.T).square().sum().item() for part, slope in parts) / len(y)
    again, loss = moments.lost(weight, weight - other.weight, second)
    # A ridge is added to the moment.
    assert loss == pytest.approx(weighted, rel=1e-6, abs=1e-6)
    assert again == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("batch", [FEW, MANY])
def test_output_error_and_variance_are_the_measured_ones(batch):
    for geometry in PLAIN:
        check_output_error(geometry, batch)


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (5,), (0, 5)], ids=str)
def test_linear_inputs_of_any_leading_shape(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    moments = seen(LayerSpec(5, 2), x, torch.ones(7, 5))
    vectors = torch.cat([x.reshape(-1, 5), torch.ones(7, 5)]).double()
    assert moments.count == len(vectors)
    assert distance(moments.matrix[0], vectors.T @ vectors / len(vectors)) < 1e-6


def test_unbatched_maps_and_other_sizes_add_up():
    conv = nn.Conv2d(3, 4, 3)
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, *size, generator=generator).double() for size in ((5, 6), (7, 4))]
    unbatched = seen(LayerSpec.of(conv), *images)
    batched = seen(LayerSpec.of(conv), *[image[None] for image in images])
    assert unbatched.sizes == batched.sizes == ((5, 6), (7, 4))
    assert unbatched.count == 3 * 4 + 5 * 2
    assert torch.equal(unbatched.rows, batched.rows)


def test_rows_become_a_matrix_with_the_fan_in_th_sample():
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()
    sums = Accumulator(LayerSpec(6, 2))
    for row in x[:5]:
        sums.add(row)
        assert sums.matrix is None
    assert len(sums.rows) == 5
    sums.add(x[5])
    assert (sums.rows, sums.count) == ([], 6)
    assert distance(sums.finish().matrix[0], x.T @ x / 6) < 1e-12


def test_rows_are_copies_of_the_activations():
    x = torch.ones(2, 6)
    sums = Accumulator(LayerSpec(6, 2))
    sums.add(x)
    x.zero_()
    assert torch.equal(sums.finish().rows, torch.ones(1, 2, 6))


def test_memory_is_fan_in_times_the_fewer_of_fan_in_and_samples():
    spec = LayerSpec(1000, 2)
    few, many = (seen(spec, torch.ones(count, 1000)).tensors() for count in (10, 2000))
    assert {name: t.nbytes for name, t in few.items()} == {"mean": 8000, "rows": 40_000}
    assert {name: t.nbytes for name, t in many.items()} == {"mean": 8000, "matrix": 8_000_000}
    sums = Accumulator(spec)
    sums.add(torch.ones(10, 1000))
    assert sums.nbytes < 4 * 10 * 1000 + 3 * 8 * 1000


@pytest.mark.parametrize(
    "dtype, bound", [(torch.float16, 1e-6), (torch.bfloat16, 1e-6), (torch.float32, 1e-6)], ids=str
)
@pytest.mark.parametrize("samples", [5, 300])
def test_lower_precision_is_summed_in_a_higher_one(dtype, bound, samples):
    x = skewed(torch.randn(samples, 20, generator=torch.Generator().manual_seed(0))).to(dtype)
    moments = seen(LayerSpec(20, 3), *x.split(50))
    exact = x.double()
    assert distance(full_matrix(moments)[0], exact.T @ exact / samples) < bound
    assert moments.mean.dtype == torch.float64


@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_variance_survives_a_large_mean(mean):
    x = torch.randn(6000, 20, generator=torch.Generator().manual_seed(0)) + mean
    moments = seen(LayerSpec(20, 3), *x.split(1000))
    exact = torch.cov(x.double().T, correction=0)
    assert distance(moments.second_moments()[0].matrix, exact) < 1e-4
    assert distance(moments.mean[0], x.double().mean(dim=0)) < 1e-9
    weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(1)).double()
    variance = (x.double() @ weight.T).var(dim=0, correction=0).sum().item()
    assert moments.output_variance(weight) == pytest.approx(variance, rel=1e-4)


def test_constant_inputs_have_no_variance_to_lose():
    moments = seen(LayerSpec(20, 3), torch.full((4000, 20), 0.37))
    weight = torch.ones(3, 20)
    assert moments.output_variance(weight) == 0.0
    assert moments.lost(weight, 0.5 * weight, moments.second_moments())[0] == 0.0
    without_bias = replace(moments, spec=LayerSpec(20, 3, bias=False))
    # All of the output's mean square, of which the variance is none.
    assert without_bias.lost(weight, 0.5 * weight, without_bias.second_moments())[0] == 1.0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("samples", [7, 100])
def test_second_moments_are_about_the_mean_where_a_bias_takes_it_up(bias, samples):
    spec = LayerSpec.of(nn.Conv1d(8, 6, 3, groups=2, bias=bias))
    x = skewed(torch.randn(samples, 8, 3, generator=torch.Generator().manual_seed(0)).double())
    rows = x.reshape(samples, 2, 12).transpose(0, 1)
    if bias:
        rows = rows - rows.mean(dim=1, keepdim=True)
    moments = seen(spec, x)
    kernel = torch.randn(3, 12, generator=torch.Generator().manual_seed(1)).double()
    for second, group in zip(moments.second_moments(), rows, strict=True):
        assert (second.rows is None) == (samples > 12)
        lost = (group @ kernel.T).square().sum().item() / samples
        assert second.lost(kernel) == pytest.approx(lost)


def check_cross_moments(geometry):
    layer, spec, x = geometry.layer(), geometry.spec, skewed(geometry.input(MANY))
    with torch.no_grad():
        y = layer(x) + 1.0
    sums = Accumulator(spec)
    for part, outputs in zip(x.split(5), y.split(5), strict=True):
        sums.add(part, outputs)
    cross, mean = sums.mean_cross()
    rows = dense_rows(geometry, x)
    targets = _rows(y, layer).reshape(-1, spec.groups, spec.group_out).transpose(0, 1)
    assert distance(cross, targets.transpose(1, 2) @ rows / rows.shape[1]) < 1e-12
    assert distance(mean, targets.mean(dim=1)) < 1e-12


def test_cross_moments_with_outputs():
    for geometry in PLAIN:
        check_cross_moments(geometry)


@pytest.mark.parametrize("samples", [(3, 4), (3, 20), (20, 3), (30, 40), (5, 7)], ids=str)
def test_merged_moments_are_those_of_all_samples(samples):
    generator = torch.Generator().manual_seed(0)
    parts = [skewed(torch.randn(n, 12, generator=generator).double()) for n in samples]
    spec = LayerSpec(12, 5)
    gradients = [torch.eye(5).double(), 3 * torch.eye(5).double()]
    first, second = (
        replace(seen(spec, part), gradient=gradient)
        for part, gradient in zip(parts, gradients, strict=True)
    )
    merged, whole = first.merged(second, share=0.25), seen(spec, *parts)
    assert merged.count == whole.count
    assert (merged.rows is None) == (whole.rows is None) == (sum(samples) >= 12)
    assert distance(full_matrix(merged), full_matrix(whole)) < 1e-12
    assert distance(merged.mean, whole.mean) < 1e-12
    assert torch.equal(merged.gradient, 2.5 * torch.eye(5).double())
    assert first.merged(replace(second, gradient=None), share=0.5).gradient is None


def test_nothing_seen_is_no_moments():
    assert Accumulator(LayerSpec(6, 2)).finish() is None
    assert seen(LayerSpec(6, 2), torch.zeros(0, 6)) is None
    assert seen(LayerSpec.of(nn.Conv1d(6, 2, 3)), torch.zeros(0, 6, 5)) is None


@pytest.mark.parametrize("mode", ["inference", "autocast"])
def test_modes_of_the_caller_do_not_matter(mode):
    x = skewed(torch.randn(100, 12, generator=torch.Generator().manual_seed(0)))
    sums = Accumulator(LayerSpec(12, 5))
    inside = torch.inference_mode() if mode == "inference" else torch.autocast("cpu")
    with inside:
        sums.add(x)
    moments = sums.finish()
    assert not moments.matrix.is_inference()
    assert distance(moments.matrix[0], x.double().T @ x.double() / 100) < 1e-6


def sampled(geometry, most, *, expected=0, seed=0):
    """Sums over a sample of the patches of batches of several sizes, and over all of them."""
    spec, layer = geometry.spec, geometry.layer()
    batches = [skewed(geometry.input(n)) for n in (2, 40, 9)]
    some, every = Accumulator(spec, most, expected, seed), Accumulator(spec)
    for x in batches:
        for sums in (some, every):
            sums.add(x, layer(x))
    return layer, some, every


@pytest.mark.parametrize("geometry", PLAIN, ids=str)
def test_of_many_patches_a_sample_stands_for_all(geometry):
    layer, some, every = sampled(geometry, geometry.spec.fan_in)
    cross, _ = some.mean_cross()
    moments = some.finish()
    assert moments.count == every.count
    bias = (
        layer.bias.detach() if layer.bias is not None else torch.zeros(geometry.spec.out_channels)
    )
    parts = zip(moments.kernels(layer.weight), bias.chunk(len(cross)), strict=True)
    for group, (kernel, shift) in enumerate(parts):
        # The outputs are those at the very places of the patches.
        wanted = kernel @ full_matrix(moments)[group] + shift[:, None] * moments.mean[group]
        assert distance(cross[group], wanted) < 1e-10


def test_a_sample_of_patches_is_unbiased_whatever_the_sizes_of_the_batches():
    geometry = next(g for g in PLAIN if g.spec.ndim == 2)
    for expected in (0, 10_000):
        found = [sampled(geometry, 60, expected=expected, seed=seed)[1:] for seed in range(60)]
        matrices = torch.stack([full_matrix(some.finish()) for some, _ in found])
        every = full_matrix(found[0][1].finish())
        alone, together = distance(matrices[0], every), distance(matrices.mean(0), every)
        assert alone > 0.02
        assert together < 0.3 * alone


def test_the_same_seed_takes_the_same_sample():
    geometry = next(g for g in PLAIN if g.spec.ndim == 2)
    first, again, other = (sampled(geometry, 60, seed=seed)[1].finish() for seed in (3, 3, 4))
    assert torch.equal(first.matrix, again.matrix)
    assert not torch.equal(first.matrix, other.matrix)


def test_no_sample_is_smaller_than_a_patch():
    geometry = next(g for g in PLAIN if g.spec.ndim == 2)
    _, some, _ = sampled(geometry, 1)
    assert torch.linalg.matrix_rank(some.finish().matrix[0]) == geometry.spec.fan_in
