import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tdecomp.layers.patches import count_patches, output_rows, patches, patches_at, to_kernel_order
from tdecomp.layers.spec import LayerSpec
from tests.decomposers.oracle import SAME_PADDING_OF_EVEN_KERNELS, distance
from tests.geometries import DEPTHWISE, GEOMETRIES, case, geometries

PLAIN = [g for g in (*GEOMETRIES, *DEPTHWISE) if not g.spec.transposed]
pytestmark = pytest.mark.filterwarnings(SAME_PADDING_OF_EVEN_KERNELS)


# A handful of rows at a time, so that every split happens.
TINY = {"chunk_bytes": 1, "least_rows": 3}


def rows_of(x, spec, **sizes):
    """All slices together, in the order of the weight: (groups, positions, fan_in)."""
    slices = patches(x, spec, **sizes)
    return torch.cat([to_kernel_order(rows, spec, (2,)) for rows in slices], dim=1)


def outputs_of(layer, rows):
    """The kernel times the patches, as rows (positions, out)."""
    kernels = layer.weight.detach().flatten(1).chunk(len(rows))
    together = torch.cat([group @ kernel.T for group, kernel in zip(rows, kernels, strict=True)], 1)
    return together if layer.bias is None else together + layer.bias.detach()


def check(geometry, *batch, **sizes):
    layer, spec, x = geometry.layer(), geometry.spec, geometry.input(*batch)
    rows = rows_of(x, spec, **sizes)
    assert rows.shape[::2] == (spec.groups, spec.fan_in)
    with torch.no_grad():
        assert distance(outputs_of(layer, rows), output_rows(layer(x), spec)) < 1e-12


@pytest.mark.parametrize("geometry", PLAIN, ids=str)
def test_kernel_times_patches_is_the_output(geometry):
    for batch in ((), (1,), (3,)):
        with case(batch):
            check(geometry, *batch)
    with case("in small slices"):
        check(geometry, 3, **TINY)
        slices = list(patches(geometry.input(3), geometry.spec, **TINY))
        assert len(slices) > 1 or sum(rows.shape[1] for rows in slices) <= 3


@given(geometry=geometries(ndims=(0, 1, 2, 3), transposed=(False,)), batch=st.integers(1, 3))
def test_drawn_kernel_times_patches_is_the_output(geometry, batch):
    check(geometry, batch)


def test_linear_takes_any_leading_shape():
    spec = LayerSpec(5, 2)
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rows_of(x, spec)[0], x.reshape(24, 5))
    assert torch.equal(rows_of(x[0, 0, 0], spec)[0], x[0, 0, :1])


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 2, groups=2)]
)
def test_memory_format_of_the_input_does_not_matter(layer):
    x = torch.randn(3, 6, 5, 4, generator=torch.Generator().manual_seed(0))
    spec = LayerSpec.of(layer)
    expected = rows_of(x, spec, **TINY)
    assert torch.equal(rows_of(x.to(memory_format=torch.channels_last), spec, **TINY), expected)
    every_other = torch.stack([x, -x], dim=-1).flatten(3)[..., ::2]
    assert torch.equal(rows_of(every_other, spec, **TINY), expected)


def test_slices_are_bounded():
    conv = LayerSpec.of(nn.Conv2d(64, 4, 3, padding=1))
    slices = list(patches(torch.zeros(4, 64, 60, 60), conv))
    most = max(rows.numel() * rows.element_size() for rows in slices)
    # A whole line of an image at least, and a few thousand rows.
    assert most <= (2048 + 60) * conv.fan_in * 4
    assert sum(rows.shape[1] for rows in slices) == 4 * 60 * 60


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, 3), nn.Conv2d(6, 4, 1)])
def test_input_is_left_alone(layer):
    shape = (2, 6) if isinstance(layer, nn.Linear) else (2, 6, 5, 5)
    x = torch.ones(shape)
    for rows in patches(x, LayerSpec.of(layer)):
        rows.sum()
    assert torch.equal(x, torch.ones(shape))


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 4, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1, 2)])
def test_no_images_make_no_patches(layer):
    assert rows_of(torch.zeros(0, 6, 5, 5), LayerSpec.of(layer)).shape[1] == 0


def test_kernel_order_of_several_dimensions():
    spec = LayerSpec.of(nn.Conv2d(3, 4, (2, 3)))
    vector = torch.arange(spec.fan_in).reshape(2, 3, 3).permute(2, 0, 1).reshape(-1)
    values = torch.randn(1, spec.fan_in, spec.fan_in, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_kernel_order(values, spec, (1, 2)), values[:, vector][:, :, vector])


@pytest.mark.parametrize("geometry", PLAIN, ids=str)
def test_patches_at_some_places_are_those_of_all(geometry):
    for batch in ((), (3,)):
        x, spec = geometry.input(*batch), geometry.spec
        every = torch.cat(list(patches(x, spec)), dim=1)
        assert count_patches(x, spec) == every.shape[1]
        places = torch.arange(every.shape[1] - 1, -1, -3)
        assert torch.equal(patches_at(x, spec, places), every[:, places])


def test_patches_at_some_places_have_no_padding_that_is_not_zero():
    x = torch.full((1, 2, 3, 3), torch.inf)
    spec = LayerSpec.of(nn.Conv2d(2, 4, 3, padding=1))
    assert patches_at(x, spec, torch.tensor([0])).isnan().sum() == 0
