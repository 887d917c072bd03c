from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tdecomp.model.batches import (
    BatchError,
    Batches,
    call_model,
    count_samples,
    device_of,
    in_parts,
    tensors_of,
)

CPU = torch.device("cpu")
Pair = namedtuple("Pair", "x y")


@dataclass
class Example:
    x: torch.Tensor


class Two(nn.Module):
    def forward(self, x, y, scale=1.0):
        return scale * (x + y)


class Any(nn.Module):
    def forward(self, *parts):
        return sum(parts)


class KeywordOnly(nn.Module):
    def forward(self, x, *, scale):
        return scale * x


ONE = torch.ones(2, 3)


@pytest.mark.parametrize(
    "model, batch, expected",
    [
        (nn.Identity(), ONE, 1),
        (nn.Identity(), (ONE, "labels"), 1),
        (nn.Identity(), [ONE, torch.zeros(2)], 1),
        (nn.Identity(), (ONE,), 1),
        (Two(), (ONE, ONE), 2),
        (Two(), (ONE, ONE, torch.zeros(2)), 2),
        (Two(), {"y": ONE, "x": ONE, "scale": 3.0}, 6),
        (Two(), Pair(ONE, ONE), 2),
        (Any(), (ONE, ONE, ONE), 3),
        (KeywordOnly(), {"x": ONE, "scale": 2.0}, 2),
    ],
)
def test_model_gets_what_its_forward_cannot_do_without(model, batch, expected):
    assert torch.equal(call_model(model, batch), expected * ONE)


@pytest.mark.parametrize("data", [ONE, {"x": ONE}], ids=["tensor", "dict"])
def test_single_tensor_or_dict_is_one_batch(data):
    (batch,) = Batches(data, "test").on(CPU)
    assert batch is data or batch == data


def test_batches_of_a_loader_can_be_gone_through_again():
    loader = DataLoader(TensorDataset(torch.arange(10.0)), batch_size=4)
    batches = Batches(loader, "test", max_batches=2)
    batches.again("this")
    assert len(batches) == 2
    for _ in range(2):
        assert [len(x) for (x,) in batches.on(CPU)] == [4, 4]


def test_generator_is_read_no_further_than_the_limit():
    source = iter([ONE] * 5)
    batches = Batches(source, "test", max_batches=2)
    assert len(batches) == 0
    assert len(list(batches.on(CPU))) == 2
    assert len(list(source)) == 3
    with pytest.raises(ValueError, match=r"test: this goes through the batches more than once"):
        batches.again("this")


@pytest.mark.parametrize("data", [None, 3, "abc", nn.Identity()], ids=repr)
def test_what_is_no_batches_is_refused(data):
    with pytest.raises(TypeError, match=f"test: expected batches.*got {type(data).__name__}"):
        Batches(data, "test")


@pytest.mark.parametrize("limit", [0, -1, True, 1.5])
def test_wrong_limit_is_refused(limit):
    with pytest.raises(ValueError, match=f"test: expected max_batches.*got {limit}"):
        Batches([ONE], "test", max_batches=limit)


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="test: got no batches"):
        list(Batches([], "test").on(CPU))
    exhausted = iter([ONE])
    list(exhausted)
    with pytest.raises(ValueError, match="exhausted generator"):
        list(Batches(exhausted, "test").on(CPU))


@pytest.mark.parametrize(
    "batch", [torch.ones(2, 5), (torch.ones(2, 5), "labels"), {"nonsense": ONE}, None]
)
def test_rejected_batch_says_what_it_was_and_what_is_expected(batch):
    model = nn.Linear(3, 1)
    with pytest.raises(BatchError, match="test: the model rejected a batch") as error:
        Batches([batch], "test").run(model, batch)
    assert "forward=" in str(error.value)
    if isinstance(batch, torch.Tensor):
        assert "(2, 5)" in str(error.value)


def test_forward_says_how_the_model_is_called():
    batches = Batches([Example(ONE)], "test", forward=lambda model, batch: model(batch.x))
    (batch,) = batches.on(CPU)
    assert torch.equal(batches.run(nn.Identity(), batch), ONE)


def test_every_tensor_of_a_batch_is_moved():
    meta = torch.device("meta")
    batch = {"a": [ONE, (ONE, "text", 3)], "b": Pair(ONE, None)}
    (moved,) = Batches([batch], "test").on(meta)
    assert moved["a"][0].device == moved["a"][1][0].device == moved["b"].x.device == meta
    assert moved["a"][1][1:] == ("text", 3)
    assert isinstance(moved["b"], Pair)
    assert moved["b"].y is None


def test_inference_tensors_become_ordinary_ones():
    with torch.inference_mode():
        x = torch.ones(2)
    (batch,) = Batches([{"x": x}], "test").on(CPU)
    assert not batch["x"].is_inference()


@pytest.mark.parametrize(
    "batch, samples",
    [
        (torch.zeros(7, 2), 7),
        (torch.zeros(()), 1),
        ([torch.zeros(7, 2), torch.zeros(3)], 7),
        ({"text": "a", "x": torch.zeros(5)}, 5),
        (({"x": torch.zeros(5)}, "labels"), 5),
        (UserDict(x=torch.zeros(5)), 5),
        (Example(torch.zeros(5)), 5),
        (["text"], 1),
        (3, 1),
    ],
)
def test_samples_are_the_length_of_the_first_tensor(batch, samples):
    assert count_samples(batch) == samples


def test_parts_of_a_batch_are_cut_alike():
    batch = {"x": torch.arange(9), "y": (torch.arange(9), "text", torch.arange(3), torch.zeros(()))}
    parts = in_parts(batch, 4, 7)
    assert [part["x"].tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6]]
    assert [part["y"][0].tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6]]
    assert all(part["y"][1] == "text" and len(part["y"][2]) == 3 for part in parts)
    assert len(in_parts(torch.zeros(9, 2), 4, 100)) == 3


@pytest.mark.parametrize("batch", [torch.zeros(4, 2), Example(torch.zeros(9)), "text", [3]])
def test_batch_that_is_small_or_of_another_kind_is_one_part(batch):
    (part,) = in_parts(batch, 4, 100)
    assert part is batch


def test_tensors_of_any_output_in_order():
    whole, half, whole_numbers = torch.zeros(1), torch.zeros(2).half(), torch.zeros(3).long()
    cyclic = Example(half)
    cyclic.again = cyclic
    output = {"a": (whole, [cyclic, None, "text"]), "b": whole_numbers, "c": whole}
    found = tensors_of(output)
    assert [id(t) for t in found] == [id(whole), id(half), id(whole)]
    assert tensors_of(None) == []


def test_device_is_that_of_the_first_tensor():
    assert device_of(nn.Linear(2, 2, device="meta")).type == "meta"
    assert device_of(nn.BatchNorm1d(3, affine=False, device="meta")).type == "meta"
    assert device_of(nn.ReLU()) == CPU


def test_bar_can_be_switched_off(capsys):
    assert len(list(Batches([ONE], "test").bar(CPU, "title", progress=False))) == 1
    assert capsys.readouterr().err == ""
    list(Batches([ONE], "test").bar(CPU, "title", progress=True))
    assert "title: 100%" in capsys.readouterr().err
