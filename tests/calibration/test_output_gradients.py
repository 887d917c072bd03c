"""Gradients at the layers' outputs are those of the Jacobians, taken from the first samples."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from tdecomp.calibration.output_gradients import OutputGradients
from tdecomp.calibration.passes import batches_for
from tdecomp.layers.spec import LayerSpec
from tdecomp.runtime.torch_state import no_inference_mode
from tests.calibration.small_model import Example, check_same, images, small, taken
from tests.decomposers.oracle import distance
from tests.unchanged import unchanged


def jacobian_moments(model, x):
    """``E[JᵀJ]`` of each layer by torch's own Jacobians, one sample at a time."""
    model = copy.deepcopy(model).requires_grad_(False)
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        total = 0.0
        for sample in x:

            def outputs(delta, layer=layer, sample=sample):
                handle = layer.register_forward_hook(lambda _, __, y: y + delta)
                with contextlib.closing(_Handle(handle)):
                    return model(sample[None]).flatten()

            shape = []
            handle = layer.register_forward_hook(
                lambda _, __, y, shape=shape: shape.append(y.shape)
            )
            model(sample[None])
            handle.remove()
            jacobian = torch.autograd.functional.jacobian(outputs, torch.zeros(shape[0]))
            by_position = jacobian.flatten(3).transpose(1, 2) if jacobian.dim() > 3 else jacobian
            rows = by_position.reshape(
                len(jacobian), shape[0][1], -1
            ).double()  # (z, out, positions)
            total = total + torch.einsum("zip,zjp->ij", rows, rows)
        found[name] = total / len(x)
    return found


class _Handle:
    def __init__(self, handle):
        self.close = handle.remove


def tiny():
    """A convolution, something in place behind it, and a Linear."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 3, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 4)
        )


@pytest.mark.parametrize("frozen", ["none", "first", "all"])
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_gradients_are_those_of_the_jacobians(frozen, mode):
    model = tiny()
    if frozen == "all":
        model.requires_grad_(False)
    elif frozen == "first":
        model[0].requires_grad_(False)
    x = torch.randn(24, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    with mode(), unchanged(model):
        # Many draws of the mixture on the same images.
        layers = {name: (model[int(name)], LayerSpec.of(model[int(name)])) for name in "03"}
        slopes = OutputGradients(layers, batches_for("test", [x], progress=False))
        with no_inference_mode():
            slopes.add(model, x.repeat(60, 1, 1, 1), 1440)
        found = slopes.finish()
    expected = jacobian_moments(model, x)
    for name, gradient in expected.items():
        assert distance(found[name], gradient) < 0.1, name
    assert torch.equal(found["3"], found["3"].T)


def test_gradients_are_of_the_first_samples_only():
    calls = []

    def counted(model, batch):
        calls.append(torch.is_grad_enabled())
        return model(batch)

    taken(small(), [images(100)] * 4, forward=counted)
    # Sixteen samples at a time, up to 128.
    assert calls == [False] + [True] * 7 + [False] + [True] * 2 + [False] * 2
    calls.clear()
    taken(small(), [images(16)] * 10, forward=counted)
    assert calls == [False, True] * 8 + [False] * 2
    calls.clear()
    taken(small(), [images(100)] * 2, forward=counted, gradients=False)
    assert calls == [False, False]


class Sequence(nn.Module):
    """Takes one sequence of 40 vectors, each of which acts on all."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(x.reshape(40, 6)).cumsum(0)


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x, "label"), Example], ids=["tensor", "labels", "own"]
)
def test_batch_that_cannot_be_cut_is_taken_whole(wrap):
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    forward = (lambda m, b: m(b.image)) if wrap is Example else None
    moments = taken(Sequence(), [wrap(x)], forward=forward)
    assert moments["layer"].count == 40
    assert moments["layer"].gradient is not None


def test_gradients_are_the_same_every_time():
    one, other = taken(small(), [images()]), taken(small(), [images()])
    assert torch.equal(one["0"].gradient, other["0"].gradient)


class OnlyForwards(nn.Module):
    """A model that works but cannot be differentiated."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.layer = nn.Linear(20, 6)

    def forward(self, x):
        y = self.layer(x)
        if self.kind == "in place":
            y = torch.sigmoid(y)
            y += 1
        elif self.kind == "numpy":
            y = torch.from_numpy(2 * y.numpy())
        elif self.kind == "inference":
            with torch.inference_mode():
                y = torch.relu_(self.layer(x))
        elif self.kind == "detached":
            y = y.detach()
        elif self.kind == "words":
            y = {"label": "cat", "scores": None}
        return y


@pytest.mark.parametrize("kind", ["in place", "numpy"])
def test_model_that_cannot_be_differentiated_is_calibrated_without_gradients(kind):
    model, x = OnlyForwards(kind), torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="no gradients can be taken"):
        moments = taken(model, [x, x])
    assert moments["layer"].gradient is None
    check_same(moments, taken(model, [x, x], gradients=False))


@pytest.mark.parametrize("kind", ["inference", "detached", "words"])
def test_output_that_no_gradient_reaches(kind):
    moments = taken(OnlyForwards(kind), [torch.ones(50, 20)])
    assert moments["layer"].gradient is None
