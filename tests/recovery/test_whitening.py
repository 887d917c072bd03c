"""Weights in coordinates in which their layer's inputs vary alike."""

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.calibration.counted_rows import CountedRows
from tdecomp.calibration.passes import batches_for
from tdecomp.layers.grouped_linear import GroupedLinear
from tdecomp.recovery.whitening import bases_of

LAYERS = {
    "linear": (nn.Linear(6, 4), (64, 6)),
    "linear over time": (nn.Linear(6, 4, bias=False), (8, 10, 6)),
    "conv1d": (nn.Conv1d(3, 4, 3, padding=1), (8, 3, 12)),
    "grouped": (nn.Conv2d(4, 6, (3, 1), groups=2, stride=2), (8, 4, 9, 8)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, dilation=2, padding=2), (8, 4, 9, 8)),
}


def skewed(*shape):
    """Inputs of which some directions vary a thousand times as strongly as others."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x.cumsum(dim=-1) + 10.0


@pytest.fixture(params=LAYERS)
def layer_and_input(request):
    layer, shape = LAYERS[request.param]
    return layer, skewed(*shape)


def basis_of(layer, x, **data):
    batches = batches_for("test", tdecomp.Data([x], held_out=0, **data), progress=False)
    runs = [(x, lambda: layer(x))]
    return bases_of([layer], [*layer.parameters()], CountedRows(batches), runs, len(x))


def test_steps_of_equal_length_change_outputs_alike(layer_and_input):
    layer, x = layer_and_input
    basis = basis_of(layer, x)[layer.weight]
    still = torch.func.functional_call(layer, {"weight": torch.zeros_like(layer.weight)}, x)

    def spread(weight_of):
        """How many times as much the outputs change by the strongest step as by the weakest."""
        changes = []
        for place in range(basis.spec.fan_in):
            step = torch.zeros_like(layer.weight)
            step.reshape(len(step), -1)[0, place] = 1.0
            moved = torch.func.functional_call(layer, {"weight": weight_of(step)}, x)
            changes.append((moved - still).flatten())
        strengths = torch.linalg.svdvals(torch.stack(changes))
        return float(strengths[0] / strengths[-1])

    with torch.no_grad():
        assert spread(basis.outwards) < 5 < 10 < spread(nn.Identity())


def test_coordinates_and_their_gradients_are_those_of_the_weight(layer_and_input):
    layer, x = layer_and_input
    basis = basis_of(layer, x)[layer.weight]
    inside = basis.inwards(layer.weight.detach()).requires_grad_()
    assert torch.allclose(basis.outwards(inside), layer.weight, atol=1e-4)
    weight = layer.weight.detach().clone().requires_grad_()
    for given in (basis.outwards(inside), weight):
        torch.func.functional_call(layer, {"weight": given}, x).square().mean().backward()
    expected = inside.grad
    assert torch.allclose(basis.slope(weight.grad), expected, atol=1e-3 * expected.abs().max())


def test_rows_that_do_not_count_shape_no_basis():
    layer, x = nn.Linear(6, 4), skewed(8, 10, 6)
    mask = torch.arange(10).expand(8, 10) < 7
    found = [
        basis_of(layer, torch.where(mask[..., None], x, padding), mask=lambda _: mask)
        for padding in (0.0, 1e6)
    ]
    assert torch.equal(*(bases[layer.weight].inward for bases in found))


def test_layers_with_many_inputs_experts_and_frozen_ones_have_none():
    wide = nn.Linear(2000, 2)
    assert not basis_of(wide, torch.randn(4, 2000))
    assert not basis_of(GroupedLinear(2, 6, 4), skewed(16, 6))
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), skewed(16, 6)
    batches = batches_for("test", tdecomp.Data([x], held_out=0), progress=False)
    trained = [*model[1].parameters()]
    runs = [(x, lambda: model(x))]
    found = bases_of([model], trained, CountedRows(batches), runs, len(x))
    assert [*found] == [model[1].weight]
