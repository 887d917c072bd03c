import pickle
import threading
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from tdecomp.runtime.parcel import Parcel


def posted(value, protocol=5):
    return pickle.loads(pickle.dumps(Parcel(value), protocol)).open()


TENSORS = {
    "plain": lambda: torch.randn(3, 4),
    "bfloat16": lambda: torch.randn(5, 4).bfloat16(),
    "integers": lambda: torch.arange(6),
    "empty": lambda: torch.empty(0, 3),
    "one number": lambda: torch.tensor(2.5),
    "transposed": lambda: torch.randn(3, 4).T,
    "channels last": lambda: torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_arrive_with_their_values_and_strides(name, protocol):
    torch.manual_seed(0)
    tensor = TENSORS[name]()
    found = posted(tensor, protocol)
    assert found.dtype == tensor.dtype
    assert found.stride() == tensor.stride()
    assert torch.equal(found, tensor)
    assert found.data_ptr() % 64 == 0 or not found.numel()  # as torch's own: products depend on it


def test_only_values_travel_not_the_storage_that_they_are_a_part_of():
    whole = torch.randn(1000, 64)
    assert len(pickle.dumps(Parcel([whole[:2]]), 5)) < 10_000
    assert len(pickle.dumps(Parcel([whole[:, :2]]), 5)) < 20_000


def test_the_same_values_travel_once_and_stay_the_same():
    weight = torch.randn(64, 128)
    value = [weight.detach(), weight.T, weight.view(-1), weight[:2]]
    assert len(pickle.dumps(Parcel(value), 5)) < 1.2 * weight.nbytes
    found = posted(value)
    assert all(map(torch.equal, found, value))
    assert [t.stride() for t in found] == [t.stride() for t in value]
    assert len({t.data_ptr() for t in found[:3]}) == 1


def test_parameters_are_sent_detached_and_stay_where_they_are():
    layer = nn.Linear(8, 8)
    found = posted({"weight": layer.weight, "again": layer.weight})
    assert type(found["weight"]) is torch.Tensor
    assert not found["weight"].requires_grad
    assert found["again"] is found["weight"]
    assert not layer.weight.is_shared()
    assert layer.weight.requires_grad


def test_in_this_process_it_is_the_value_itself():
    value = threading.Lock()  # which nothing can pickle
    assert Parcel(value).open() is value


def test_it_can_be_passed_on():
    arrived = pickle.loads(pickle.dumps(Parcel(torch.ones(3)), 5))
    assert torch.equal(pickle.loads(pickle.dumps(arrived, 5)).open(), torch.ones(3))


def test_a_result_is_named_by_what_it_was_made_of():
    item = pickle.loads(pickle.dumps(Parcel("layer 'c'")))
    with pytest.raises(TypeError, match="layer 'c': it cannot be sent"):
        pickle.dumps(Parcel(threading.Lock(), made_of=item))


@dataclass
class Locked:
    lock: object = field(default_factory=threading.Lock)

    def __str__(self):
        return "layer 'a'"


def test_what_cannot_be_pickled_is_refused_in_words():
    with pytest.raises(TypeError, match=r"layer 'a': it cannot be sent .*lock.* expected .*mod"):
        pickle.dumps(Parcel(Locked()))


def test_what_is_not_known_where_it_arrives_is_refused_in_words(monkeypatch):
    @dataclass
    class Mine:
        def __str__(self):
            return "layer 'b'"

    Mine.__qualname__, Mine.__module__ = "Gone", __name__
    monkeypatch.setitem(globals(), "Gone", Mine)
    data = pickle.dumps(Parcel(Mine()))
    monkeypatch.delitem(globals(), "Gone")
    arrived = pickle.loads(data)
    with pytest.raises(ValueError, match=r"layer 'b': a worker cannot read .*Gone.*PYTHONPATH"):
        arrived.open()


def test_two_parcels_are_never_the_same_task_to_dask():
    value = torch.ones(2)
    assert Parcel(value).__dask_tokenize__() != Parcel(value).__dask_tokenize__()
