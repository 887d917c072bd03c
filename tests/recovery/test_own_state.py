"""Models whose state dict is not their tensors, or that hold tensors of odd kinds."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.model.surgery import tensors_in
from tests.recovery.networks import QUIET, convnet, decomposed, images, whole


class Own(nn.Module):
    """A network inside another module, which may keep a state of its own."""

    def __init__(self, **buffers):
        super().__init__()
        self.net = convnet()
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, x):
        return self.net(x)


class Halves(Own):
    def state_dict(self, *args, **options):
        return {name: t.half() for name, t in super().state_dict(*args, **options).items()}


class Extra(Own):
    def get_extra_state(self):
        return {"epoch": 3}

    def set_extra_state(self, _):
        raise RuntimeError("a step loads no state")


class Scaled(Own):
    """Whose expanded buffer is replaced in each pass."""

    def __init__(self):
        super().__init__(scale=torch.ones(1).expand(10))

    def forward(self, x):
        self.scale = self.scale * 1.0
        return super().forward(x) * self.scale


def hooked():
    model = Own()
    model.register_state_dict_post_hook(
        lambda _, state, *__: [state.update({k: v.clone()}) for k, v in state.items()]
    )
    return model


def quantized():
    last = nn.Sequential(nn.Linear(10, 10))
    last = torch.ao.quantization.quantize_dynamic(last, {nn.Linear}, dtype=torch.qint8)
    return nn.Sequential(convnet(), last)


def tied():
    model = nn.Sequential(convnet(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10))
    model[3].weight = model[1].weight
    model.register_buffer("mean", model[0][1].running_mean)
    return model


MODELS = {
    "hooks that copy": hooked,
    "a state dict of its own": Halves,
    "extra state": Extra,
    "expanded": lambda: Own(mask=torch.zeros(()).expand(3, 4)),
    "expanded and replaced": Scaled,
    "quantized": quantized,
    "tied": tied,
    "sparse": lambda: Own(graph=torch.eye(4).to_sparse()),
    "compressed": lambda: Own(graph=torch.eye(4).to_sparse_csr()),
    "on the meta device": lambda: Own(unused=torch.ones(3, device="meta")),
    "of 4 bits": lambda: Own(packed=torch.ones(4, dtype=torch.uint8).view(torch.uint4)),
}
STEPS = {
    "refit": tdecomp.refit,
    "reconstruct": partial(tdecomp.reconstruct, epochs=20),
    "distill": lambda *args, **options: tdecomp.distill(*args, steps=5, **options),
    "recalibrate_batchnorm": lambda model, original, batches, **options: (
        tdecomp.recalibrate_batchnorm(model, batches, original=original, **options)
    ),
}


@pytest.mark.filterwarnings("ignore:.*(quantiz|[Ss]parse|TypedStorage)")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_changes_the_tensors_themselves(step, kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        original, batches = MODELS[kind]().eval(), whole(images(2))
    model = decomposed(original, rank=3)
    with torch.no_grad():  # statistics that are not those of the images
        next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).running_mean.add_(1)
    before, held = values(model), tensors_in(model)
    copied = STEPS[step](model, original, batches, **QUIET)
    assert all(torch.equal(tensor, before[name]) for name, tensor in values(model).items())
    after = values(copied.model)
    assert not all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    recovery = STEPS[step](model, original, batches, inplace=True, **QUIET)
    assert recovery == replace(copied, model=model)
    assert all(tensor is held[name] for name, tensor in tensors_in(model).items())
    assert all(torch.equal(tensor, after[name]) for name, tensor in values(model).items())


def values(model):
    """Copies of all tensors but those of odd kinds."""
    odd = ("graph", "unused", "packed")
    return {n: t.detach().clone() for n, t in tensors_in(model).items() if n not in odd}


@pytest.mark.filterwarnings("ignore:.*(quantiz|[Ss]parse|TypedStorage)")
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_recovered_in_the_pipeline_is_the_model_itself(kind):
    model, batches = MODELS[kind]().eval(), images(2)
    options = {"rank": 3, "data": batches, "recover": ["refit", "recalibrate_batchnorm"], **QUIET}
    copied = tdecomp.decompose(model, "svd", **options).model
    result = tdecomp.decompose(model, "svd", inplace=True, **options)
    assert result.model is model
    with torch.no_grad():
        assert torch.equal(model(batches[0]), copied(batches[0]))
