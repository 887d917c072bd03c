"""Which samples are held out: a share, always the same ones, and none that are fitted to."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import tdecomp
from tdecomp import Data
from tdecomp.calibration.passes import Batches

CPU = torch.device("cpu")


def numbers(count, size):
    """Batches of numbers that tell the samples apart."""
    return list(torch.arange(float(count)).reshape(-1, 1).split(size))


def sides(batches):
    """The samples of one pass to fit to, and of one over those held out."""
    sides = batches.on(CPU), batches.held_out_on(CPU)
    return [[x for batch in side for x in values(batch)] for side in sides]


def values(batch):
    return (batch if isinstance(batch, torch.Tensor) else batch[0]).flatten().tolist()


def batches_of(data, **options):
    return Batches(Data(data, **options), "test")


@pytest.mark.parametrize("share", [-0.1, 0.51, 1, float("nan"), True, "a", None, 2])
def test_a_share_that_cannot_be(share):
    with pytest.raises(ValueError, match=r"data: expected held_out to be a share from 0 to 0\.5"):
        Data([torch.ones(2, 3)], held_out=share)


@pytest.mark.parametrize("lazy", [False, True], ids=["list", "generator"])
@pytest.mark.parametrize("count, share, held", [
    (2, 0.2, 1), (5, 0.2, 1), (10, 0.2, 2), (50, 0.2, 10), (50, 0.5, 25), (50, 0.01, 1), (3, 0, 0),
])  # fmt: skip
def test_whole_batches_are_held_out_where_there_are_several(count, share, held, lazy):
    given = numbers(3 * count, 3)
    data = (batch for batch in given) if lazy else given
    parts = list(batches_of(data, held_out=share).parts(CPU))
    assert [values(batch) for batch, _ in parts] == [values(batch) for batch in given]
    assert sum(outside for _, outside in parts) == held
    assert not parts[0][1]


@pytest.mark.parametrize("sizes, held", [
    ((1, 500), [0]), ((500, 1), [1]), ((300, 1, 9, 202), [1, 2]), ((10, 10, 10, 5000), [1]),
    ((5000, 10, 10, 400), [1, 2, 3]),
])  # fmt: skip
def test_of_batches_of_several_sizes_about_a_share_of_the_samples_is_held_out(sizes, held):
    parts = batches_of([torch.zeros(size, 1) for size in sizes]).parts(CPU)
    assert [number for number, (_, outside) in enumerate(parts) if outside] == held


def test_rows_of_the_only_batch_are_held_out():
    batch = {"x": torch.arange(40.0), "y": (torch.arange(40), "text"), "size": torch.ones(3)}
    batches = batches_of(batch)
    (fit,), (held,) = (list(side) for side in (batches.on(CPU), batches.held_out_on(CPU)))
    assert batches.holds_out
    assert len(held["x"]) == 8
    assert {*fit["x"].tolist(), *held["x"].tolist()} == {*range(40)}
    for part in (fit, held):
        assert torch.equal(part["x"], part["y"][0])
        assert torch.equal(part["size"], torch.ones(3))


@pytest.mark.parametrize("batch", [
    torch.ones(1, 3), (torch.ones(1, 3), torch.ones(5)), nn.Identity(),
    pack_sequence([torch.ones(3, 2), torch.ones(2, 2)]), {"x": torch.tensor(3.0)},
], ids=["one", "one-of-several", "object", "packed", "scalar"])  # fmt: skip
def test_what_cannot_be_cut_is_fitted_to_and_serves_the_errors(batch):
    batches = batches_of([batch])
    assert len(list(batches.on(CPU))) == len(list(batches.held_out_on(CPU))) == 1
    assert not batches.holds_out


def test_nothing_held_out_is_everything_twice():
    batches = batches_of(numbers(6, 2), held_out=0)
    assert sides(batches) == [[*range(6)]] * 2
    assert not batches.holds_out


@pytest.mark.parametrize("options", [
    {"batch_size": 8}, {"batch_size": 8, "shuffle": True}, {"batch_size": 1, "shuffle": True},
    {"batch_size": 64, "drop_last": True},
    {"batch_sampler": [[3, 4], [torch.tensor(5)], [*range(6, 64)]]},
    {"sampler": torch.utils.data.RandomSampler(range(64), replacement=True, num_samples=50)},
], ids=["in-order", "shuffled", "one-by-one", "one-batch", "sampler", "twice"])  # fmt: skip
def test_samples_of_a_data_set_never_change_sides(options):
    torch.manual_seed(0)
    batches = batches_of(DataLoader(TensorDataset(torch.arange(64.0)), **options))
    passes = [sides(batches) for _ in range(4)]
    fit, held = ({x for one in passes for x in one[side]} for side in range(2))
    assert not fit & held
    assert len(fit) >= 40
    assert 5 <= len(held) <= 13
    assert batches.holds_out
    assert batches.seen.steady


def test_batches_of_a_data_set_stay_as_large_as_they_were():
    loader = DataLoader(TensorDataset(torch.arange(64.0)), batch_size=8, drop_last=True)
    batches = batches_of(loader)
    assert [len(values(batch)) for batch in batches.on(CPU)] == [8] * 6
    assert [len(values(batch)) for batch in batches.held_out_on(CPU)] == [8, 5]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("limit", [1, 2, 5])
def test_a_limit_holds_for_both_sides_together(limit, shuffle):
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.arange(1000.0)), batch_size=4, shuffle=shuffle)
    fit, held = sides(batches_of(loader, max_batches=limit))
    assert fit
    assert held
    assert len(fit) + len(held) <= 4 * limit + 4


class Keyed(Dataset):
    """A data set whose samples have names."""

    def __getitem__(self, key):
        return torch.tensor(float(key.removeprefix("sample ")))

    def __len__(self):
        return 200


def test_samples_that_have_names():
    batches = batches_of(DataLoader(Keyed(), batch_sampler=[[f"sample {i}"] for i in range(200)]))
    fit, held = sides(batches)
    assert sorted(fit + held) == [*range(200)]
    assert 20 <= len(held) <= 60


class Restless(IterableDataset):
    """Other samples at the same place in each pass."""

    def __iter__(self):
        yield from torch.randperm(30)


@pytest.mark.parametrize("data, steady", [
    (numbers(30, 3), True), (DataLoader(Restless(), batch_size=3), False),
], ids=["list", "restless"])  # fmt: skip
def test_other_samples_in_the_next_pass_are_noticed(data, steady):
    torch.manual_seed(0)
    batches = batches_of(data)
    for _ in range(2):
        list(batches.on(CPU))
    assert batches.seen.steady == steady


class Refilled:
    """A loader that fills the same tensor again for each batch."""

    def __iter__(self):
        kept = torch.zeros(2, 1)
        for batch in numbers(12, 2):
            yield kept.copy_(batch)


def test_a_loader_that_fills_the_same_tensor_again():
    seen = [values(batch) for batch, _ in batches_of(Refilled()).parts(CPU)]
    assert seen == [values(batch) for batch in numbers(12, 2)]


class Graph(nn.Module):
    """Takes the nodes of one graph, and edges by the numbers of nodes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, nodes, edges):
        start, end = edges
        x = self.first(nodes)
        return self.second(x.index_add(0, end, x[start]).relu())


@pytest.mark.parametrize("recover", [(), ["refit", "distill"]], ids=["fit", "recover"])
def test_rows_that_are_no_samples_are_not_held_out(recover):
    torch.manual_seed(0)
    model, batch = Graph().eval(), (torch.randn(30, 12), torch.randint(0, 30, (2, 80)))
    recover = [tdecomp.Distill(steps=3) if step == "distill" else step for step in recover]
    result = tdecomp.decompose(model, "svd", rank=3, data=[batch], recover=recover, progress=False)
    assert result.report["first"].output_error_se is None
    for step in result.report.recovery:
        assert "nothing was held out" in str(step)
    alone = tdecomp.refit(result.model, model, [batch], progress=False)
    assert alone.samples == 0


def test_a_batch_that_the_model_rejects_is_told_as_it_was_given():
    with pytest.raises(ValueError, match=r"calibrate: the model rejected a batch .*\(20, 7\)"):
        tdecomp.calibrate(nn.Linear(6, 2), torch.ones(20, 7), progress=False)


class Stream(IterableDataset):
    """Samples of a data set that has no length."""

    def __iter__(self):
        return iter(torch.randn(40, 4, generator=torch.Generator().manual_seed(0)))


def test_a_loader_whose_data_set_has_no_length():
    loader = DataLoader(Stream(), batch_size=8)
    moments = tdecomp.calibrate(nn.Linear(4, 4), loader, progress=False)
    assert (moments.samples, moments.held_out) == (32, 8)
