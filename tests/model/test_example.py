"""How inputs become a call of the model."""

from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.model.batches import call_with, describe
from tdecomp.model.example import Example

IMAGE = torch.zeros(1, 4, 3, 3)
VECTOR = torch.zeros(1, 4)


def test_inputs_are_a_tensor_a_tuple_or_a_mapping():
    def given(*args, **kwargs):
        return args, kwargs

    assert call_with(given, IMAGE) == ((IMAGE,), {})
    assert call_with(given, (IMAGE, 2)) == ((IMAGE, 2), {})
    assert call_with(given, {"a": IMAGE}) == ((), {"a": IMAGE})
    assert call_with(given, UserDict(a=IMAGE)) == ((), {"a": IMAGE})  # as tokenizers give them


def test_words():
    assert describe((VECTOR, {"a": 1})) == "(float32 tensor of shape (1, 4), {a: int})"
    assert Example(VECTOR).describe() == "float32 tensor of shape (1, 4)"
    assert "called by forward" in Example(VECTOR, lambda model, x: model(x)).describe()


def test_an_example_of_an_example_is_the_same():
    example = Example(VECTOR)
    assert Example.of(example) is example
    assert Example.of(VECTOR) == example


@pytest.mark.parametrize(
    "example",
    [
        Example(VECTOR),
        Example((VECTOR,)),
        Example({"input": VECTOR}),
        Example("anything", lambda model, _: model(VECTOR)),
    ],
)
def test_running(example):
    assert example.run(nn.Linear(4, 2)).shape == (1, 2)


def test_the_layout_of_images_in_containers():
    Pair = namedtuple("Pair", "image vector")
    given = ({"a": IMAGE, "b": VECTOR}, [IMAGE], Pair(IMAGE, VECTOR), "word")
    first, listed, pair, word = Example(given).in_layout("channels_last").inputs
    for image in (first["a"], listed[0], pair.image):
        assert image.is_contiguous(memory_format=torch.channels_last)
    assert first["b"] is pair.vector is VECTOR
    assert word == "word"
    assert IMAGE.is_contiguous()


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.decoder(self.encoder(x))


def test_forward_holds_for_counting():
    model, x = Autoencoder(), {"x": torch.zeros(5, 16)}
    options = {"example_inputs": x, "progress": False}
    plan = tdecomp.plan(model, "svd", rank=2, forward=lambda m, x: m.encoder(x["x"]), **options)
    assert plan["encoder"].macs_before == plan.before.macs == 5 * 16 * 16
    assert plan["decoder"].macs_before == 0
    assert tdecomp.plan(model, "svd", rank=2, **options)["decoder"].macs_before == 5 * 16 * 16


def test_forward_holds_for_the_time_of_the_result():
    model, x = Autoencoder(), [torch.zeros(5, 16)]
    plan = tdecomp.plan(model, "svd", rank=2, progress=False)
    result = tdecomp.apply(
        model,
        plan,
        example_inputs=x,
        forward=lambda m, inputs: m.encoder(inputs[0]),
        progress=False,
    )
    assert result.report.speed.measured.median > 0


def test_inputs_that_forward_rejects():
    with pytest.raises(ValueError, match=r"called by forward.*KeyError.*forward\(model, inputs\)"):
        tdecomp.plan(
            Autoencoder(), "svd", rank=2, example_inputs={}, forward=lambda m, x: m(x["x"])
        )
