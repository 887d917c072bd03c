"""LayerSpec against torch's own layers: shapes, sizes, MACs and layouts."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tdecomp.layers.geometry import Call
from tdecomp.layers.spec import LayerSpec
from tests.geometries import DEPTHWISE, GEOMETRIES, geometries

# torch warns, once, that an even kernel with padding="same" pads a copy of the input.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

ALL = GEOMETRIES + DEPTHWISE
each_geometry = pytest.mark.parametrize("geometry", ALL, ids=str)


def counted(layer, x):
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    return y, counter.get_total_flops() // 2


def check_against_torch(geometry, batch):
    layer, x = geometry.layer(), geometry.input(*batch)
    spec = LayerSpec.of(layer)
    y, macs = counted(layer, x)
    call = spec.call(x.shape)
    assert spec.output_size(call.size) == tuple(y.shape[len(y.shape) - spec.ndim :])
    assert spec.macs(call) == macs
    assert spec.params == sum(p.numel() for p in layer.parameters())
    assert spec.weight_shape == tuple(layer.weight.shape)


@each_geometry
@pytest.mark.parametrize("batch", [(), (3,)], ids=["unbatched", "batched"])
def test_sizes_and_macs_are_torchs(geometry, batch):
    check_against_torch(geometry, batch)


@given(geometry=geometries(ndims=(0, 1, 2, 3)))
def test_sizes_and_macs_of_drawn_layers_are_torchs(geometry):
    check_against_torch(geometry, (2,))


def test_a_linear_counts_every_vector_of_its_input():
    spec = LayerSpec.of(nn.Linear(3, 5))
    assert spec.call((2, 4, 3)) == Call(8)
    assert spec.call((3,)) == Call(1)
    assert spec.macs(Call(8)) == 8 * 15


@each_geometry
def test_a_built_layer_is_like_the_original(geometry):
    layer, x = geometry.layer(), geometry.input(2)
    built = LayerSpec.of(layer).build(layer.weight.device, layer.weight.dtype)
    assert type(built) is type(layer)
    assert LayerSpec.of(built) == LayerSpec.of(layer)
    built.load_state_dict(layer.state_dict())
    assert torch.equal(built(x), layer(x))


def test_a_layer_is_built_on_the_cpu_unless_told_otherwise():
    assert LayerSpec(4, 3).build().weight.device == torch.empty(0).device
    half = LayerSpec(4, 3).build(torch.device("meta"), torch.bfloat16).weight
    assert (half.device.type, half.dtype) == ("meta", torch.bfloat16)


@each_geometry
def test_layouts_are_inverse_to_each_other(geometry):
    layer = geometry.layer()
    spec = LayerSpec.of(layer)
    forward = spec.to_forward_layout(layer.weight)
    assert forward.shape == (spec.out_channels, spec.group_in, *spec.kernel_size)
    assert torch.equal(spec.from_forward_layout(forward), layer.weight)


def test_the_forward_layout_of_a_transposed_layer_joins_each_outputs_weights():
    layer = nn.ConvTranspose2d(4, 6, 1, groups=2, bias=False, dtype=torch.float64)
    spec = LayerSpec.of(layer)
    plain = nn.Conv2d(4, 6, 1, groups=2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(spec.to_forward_layout(layer.weight))
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(plain(x), layer(x))


def test_pointwise_keeps_the_size_and_the_groups():
    spec = LayerSpec.of(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, padding_mode="reflect"))
    pointwise = spec.pointwise(8, 6, bias=True)
    assert str(pointwise) == "Conv2d(8→6, 1×1, groups=2)"
    assert pointwise.output_size((5, 7)) == (5, 7)
    assert LayerSpec.of(nn.Linear(4, 8)).pointwise(8, 6) == LayerSpec(8, 6, bias=False)


def test_along_keeps_one_dimensions_geometry():
    conv = nn.Conv2d(4, 8, (3, 5), stride=(2, 3), padding=(1, 2), dilation=(1, 2))
    down, across = (LayerSpec.of(conv).along([d], 4, 4) for d in (0, 1))
    assert (down.kernel_size, down.stride, down.padding) == ((3, 1), (2, 1), (1, 0))
    assert (across.kernel_size, across.stride, across.padding) == ((1, 5), (1, 3), (0, 2))
    assert (down.dilation, across.dilation) == ((1, 1), (1, 2))
    assert not down.bias
    spec = LayerSpec.of(conv)
    assert across.output_size(down.output_size((9, 20))) == spec.output_size((9, 20))
    same = replace(spec, stride=(1, 1), padding="same").along([1], 4, 4)
    assert same.padding == "same"


@each_geometry
def test_plain_data_and_back(geometry):
    spec = LayerSpec.of(geometry.layer())
    assert LayerSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    "layer, words",
    [
        (nn.Linear(4, 3), "Linear(4→3)"),
        (nn.Conv2d(4, 3, 3, bias=False), "Conv2d(4→3, 3×3, no bias)"),
        (nn.Conv2d(4, 3, (3, 1), stride=2), "Conv2d(4→3, 3×1, stride=2)"),
        (nn.Conv1d(4, 4, 3, padding="same", groups=2), "Conv1d(4→4, 3, padding=same, groups=2)"),
        (
            nn.ConvTranspose2d(4, 3, 2, stride=(2, 3), output_padding=(0, 1)),
            "ConvTranspose2d(4→3, 2×2, stride=(2, 3), output_padding=(0, 1))",
        ),
        (
            nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular", dilation=2),
            "Conv2d(4→3, 3×3, padding=1, dilation=2, padding_mode=circular)",
        ),
    ],
)
def test_words_say_what_is_unusual(layer, words):
    assert str(LayerSpec.of(layer)) == words


def test_fan_in_counts_what_one_output_sees():
    spec = LayerSpec.of(nn.Conv3d(6, 8, (3, 2, 1), groups=2))
    assert (spec.group_in, spec.group_out, spec.kernel_volume, spec.fan_in) == (3, 4, 6, 18)
    assert spec.kernel_shape == (8, 3, 3, 2, 1)
    assert math.prod(spec.kernel_shape) == spec.fan_in * spec.out_channels


def test_only_linear_layers_and_convolutions_have_a_spec():
    with pytest.raises(TypeError, match=r"known kind \(Linear, .*\), got BatchNorm2d"):
        LayerSpec.of(nn.BatchNorm2d(3))


GEOMETRY = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
NONSENSE = [
    {"groups": 0},
    {"groups": False},
    {"groups": 3},
    {"in_channels": -4},
    {"out_channels": 4.0},
    {"kernel_size": 3},
    {"kernel_size": (3,)},
    {"stride": False},
    {"stride": (0, 1)},
    {"dilation": ()},
    {"padding": "all"},
    {"padding": (-1, 0)},
    {"output_padding": None},
    {"padding": "same", "transposed": True},
]


@pytest.mark.parametrize("change", NONSENSE, ids=str)
def test_sizes_that_no_layer_has_are_refused(change):
    sizes = {"in_channels": 4, "out_channels": 4, **GEOMETRY, "output_padding": (0, 0), **change}
    with pytest.raises(ValueError, match=r"expected .* got "):
        LayerSpec(**sizes)


def test_sizes_as_torch_takes_them_are_whole_numbers():
    conv = nn.Conv2d(np.int64(4), np.int64(6), np.int64(3), padding=False)
    conv.stride = 1  # set afterwards, as to dilate a trained model
    assert LayerSpec.of(conv) == LayerSpec.of(nn.Conv2d(4, 6, 3))
    json.dumps(LayerSpec.of(conv).to_dict())
    json.dumps(LayerSpec.of(nn.Linear(np.int64(4), 3)).to_dict())


def test_calls_that_a_layer_takes():
    spec = LayerSpec.of(nn.Conv2d(4, 6, 3))
    assert spec.takes(Call(0, (3, 3)))
    for call in (Call(1, (3,)), Call(1, (1, 3)), Call(-1, (3, 3)), Call(1, (3, -3)), Call(1)):
        assert not spec.takes(call)
