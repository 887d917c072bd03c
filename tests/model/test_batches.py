import threading
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import tdecomp
from tdecomp.model.batches import (
    call_model,
    copied,
    count_samples,
    device_of,
    in_parts,
    moved,
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


def test_every_tensor_of_a_batch_is_moved():
    meta = torch.device("meta")
    batch = {"a": [ONE, (ONE, "text", 3)], "b": Pair(ONE, None)}
    there = moved(batch, meta)
    assert there["a"][0].device == there["a"][1][0].device == there["b"].x.device == meta
    assert there["a"][1][1:] == ("text", 3)
    assert isinstance(there["b"], Pair)
    assert there["b"].y is None


class Output(OrderedDict):
    """As a model's output in transformers: a mapping that takes no `update`."""

    def update(self, *_args, **_kwargs):
        raise TypeError("no update")


@pytest.mark.parametrize("kind", [UserDict, Output, MappingProxyType])
def test_any_mapping_is_keyword_arguments(kind):
    batch = kind({"x": ONE, "y": ONE})
    assert torch.equal(call_model(Two(), batch), 2 * ONE)
    there = moved(batch, torch.device("meta"))
    assert isinstance(there, dict if kind is MappingProxyType else kind)
    assert {name: x.device.type for name, x in there.items()} == {"x": "meta", "y": "meta"}
    assert batch["x"] is ONE
    assert count_samples(batch) == 2
    assert [len(part["x"]) for part in in_parts(batch, 1, 2)] == [1, 1]


class Recurrent(nn.Module):
    """It scales its packed input in place."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 8)

    def forward(self, packed):
        packed.data.mul_(2)
        return self.head(pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0])


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,)], ids=["lone", "in a tuple"])
def test_a_packed_sequence_is_one_input(wrap):
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    packed = pack_padded_sequence(x, [3, 5, 2], batch_first=True, enforce_sorted=False)
    before = packed.data.clone()
    result = tdecomp.decompose(
        Recurrent(), "svd", rank=2, example_inputs=wrap(packed), data=[wrap(packed)],
        recover=["refit"], progress=False,
    )  # fmt: skip
    assert result.report["head"].method == "svd"
    assert torch.equal(packed.data, before)
    there = moved(packed, torch.device("meta"))
    assert there.data.is_meta
    assert there.sorted_indices.is_meta
    assert there.batch_sizes is packed.batch_sizes


def test_inference_tensors_become_ordinary_ones():
    with torch.inference_mode():
        x = torch.ones(2)
    assert not moved({"x": x}, CPU)["x"].is_inference()


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


class Cache:
    """Grows with each call of a model, as a cache of keys and values does."""

    def __init__(self):
        self.seen = [torch.zeros(2, 4)]

    def __len__(self):
        return sum(map(len, self.seen))


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, cache):
        if len(cache) > 4:
            raise ValueError("too much is remembered")
        cache.seen.append(self.fc(x))
        return torch.cat(cache.seen)


def test_an_object_that_a_model_changes_stays_as_it_was():
    model, cache = Remembers(), Cache()
    inputs = {"x": torch.ones(2, 4), "cache": cache}
    result = tdecomp.decompose(
        model, "svd", rank=1, example_inputs=inputs, data=[inputs], progress=False
    )
    assert result.report["fc"].method == "svd"
    assert len(cache) == 2
    # What holds no tensor, is a model, or cannot be copied, is handed over as it is.
    cache.lock = threading.Lock()
    for value in ("text", object(), model, cache):
        assert copied(value) is value
