"""The batches that the functions inside run models on."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tdecomp
from tdecomp import Data, Moments, flip_and_shift
from tdecomp.calibration.passes import PASSES, BatchError, Batches, batches_for, batches_or_moments

CPU = torch.device("cpu")
ONE = torch.ones(2, 3)


def batches_of(data, held_out=0, **options):
    return Batches(Data(data, held_out=held_out, **options), "test")


def pictures(count=6, side=16):
    return torch.arange(count * 3 * side * side, dtype=torch.float32).reshape(count, 3, side, side)


# What a user gives ------------------------------------------------------------------------------


def test_moments_are_no_batches():
    moments = Moments({})
    assert batches_or_moments(moments) is moments
    assert batches_or_moments(None) is None
    with pytest.raises(ValueError, match="calibrate runs the model on batches, got moments"):
        batches_for("calibrate", moments)


def test_batches_and_data_become_the_same():
    plain = batches_for("test", [ONE], max_batches=3, augment=None, seed=5, progress=False)
    data = batches_for("test", Data([ONE], max_batches=3, augment=None), seed=5, progress=False)
    for given in (plain, data):
        assert (given.data.max_batches, given.data.augment) == (3, None)
        assert (given.caller, given.seed, given.progress.shown) == ("test", 5, False)
    assert Data([ONE]).augment is flip_and_shift


@pytest.mark.parametrize(
    "options", [{"max_batches": 1}, {"max_memory": 10**6}, {"augment": None}], ids=str
)
def test_an_option_beside_a_data_that_has_it(options):
    (name,) = options
    with pytest.raises(
        ValueError, match=rf"test: got {name}=.* beside a Data.*Data\(batches, {name}"
    ):
        batches_for("test", Data([ONE]), **options)


@pytest.mark.parametrize("seed", [-1, 2**32, True, 1.5, "a"])
def test_a_seed_that_cannot_be(seed):
    with pytest.raises(ValueError, match="expected seed to be None or a whole number from 0"):
        batches_or_moments([ONE], seed=seed)
    with pytest.raises(ValueError, match="expected seed"):
        batches_or_moments(None, seed=seed)


def test_each_number_and_each_seed_has_random_numbers_of_its_own():
    def drawn(seed, number):
        return torch.rand(8, generator=Batches(Data([]), "test", seed=seed).generator(number))

    assert torch.equal(drawn(3, 1), drawn(3, 1))
    assert torch.equal(drawn(None, 1), drawn(0, 1))
    different = [drawn(seed, number) for seed in (0, 1, 2**32 - 1) for number in range(PASSES)]
    assert len({tuple(numbers.tolist()) for numbers in different}) == len(different)


# The batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [ONE, {"x": ONE}], ids=["tensor", "dict"])
def test_single_tensor_or_dict_is_one_batch(data):
    (batch,) = batches_of(data).on(CPU)
    assert batch is data or batch == data


def test_batches_of_a_loader_can_be_gone_through_again():
    loader = DataLoader(TensorDataset(torch.arange(10.0)), batch_size=4)
    batches = batches_of(loader, max_batches=2)
    batches.require_several_passes("this")
    assert len(batches) == 2
    for _ in range(2):
        assert [len(x) for (x,) in batches.on(CPU)] == [4, 4]


def test_generator_is_read_no_further_than_the_limit():
    source = iter([ONE] * 5)
    batches = batches_of(source, max_batches=2)
    assert len(batches) == 0
    assert len(list(batches.on(CPU))) == 2
    assert len(list(source)) == 3
    with pytest.raises(ValueError, match=r"other: this goes through the batches more than once"):
        batches.called_by("other").require_several_passes("this")


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="test: got no batches"):
        list(batches_of([]).on(CPU))
    exhausted = iter([ONE])
    list(exhausted)
    with pytest.raises(ValueError, match="exhausted generator"):
        list(batches_of(exhausted).on(CPU))


@pytest.mark.parametrize(
    "batch", [torch.ones(2, 5), (torch.ones(2, 5), "labels"), {"nonsense": ONE}, None]
)
def test_rejected_batch_says_what_it_was_and_what_is_expected(batch):
    with pytest.raises(BatchError, match="test: the model rejected a batch") as error:
        batches_of([batch]).run(nn.Linear(3, 1), batch)
    assert "forward=" in str(error.value)
    if isinstance(batch, torch.Tensor):
        assert "(2, 5)" in str(error.value)


def test_forward_says_how_the_model_is_called():
    batches = batches_for(
        "test", [["text", ONE]], held_out=0, forward=lambda model, batch: model(batch[1])
    )
    (batch,) = batches.on(CPU)
    assert torch.equal(batches.run(nn.Identity(), batch), ONE)


def test_bar_can_be_switched_off(capsys):
    assert len(list(batches_for("test", [ONE], progress=False).bar(CPU, "title"))) == 1
    assert capsys.readouterr().err == ""
    list(batches_for("test", [ONE]).bar(CPU, "title"))
    assert "title: 100%" in capsys.readouterr().err


def test_variants_differ_from_pass_to_pass_and_from_seed_to_seed():
    seen = [
        batch
        for seed in (None, 1)
        for batch in batches_for("test", [pictures()] * 3, seed=seed).variants(CPU)
    ]
    assert len(seen) == 2 * 2 * (PASSES - 1)
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_there_are_no_variants_of_what_is_not_varied():
    assert list(batches_of([(torch.zeros(4, 3), torch.zeros(4))]).variants(CPU)) == []
    assert list(batches_of([pictures()], augment=None).variants(CPU)) == []


# Used by the public functions -------------------------------------------------------------------


def test_a_data_is_as_good_as_batches_and_limits():
    model, batches = nn.Sequential(nn.Linear(3, 4)), [torch.randn(9, 3) for _ in range(3)]
    plain = tdecomp.calibrate(model, batches, max_batches=2, progress=False)
    data = tdecomp.calibrate(model, Data(batches, max_batches=2), progress=False)
    assert torch.equal(plain["0"].matrix, data["0"].matrix)
    with pytest.raises(ValueError, match=r"calibrate: got max_batches=.* beside a Data"):
        tdecomp.calibrate(model, Data(batches), max_batches=2)


def test_augment_of_a_data_is_not_for_calibrate():
    model, data = nn.Conv2d(3, 4, 3), Data([torch.randn(1, 3, 8, 8)])
    assert tdecomp.calibrate(model, data, progress=False)[""].count == 36
    varied = tdecomp.calibrate(model, data, augment=flip_and_shift, progress=False)
    assert varied[""].count == PASSES * 36


def test_with_a_seed_a_loader_that_shuffles_comes_in_the_same_order_whatever_was_drawn_before():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4), torch.randn(64, 3)
    loader = DataLoader(TensorDataset(x), batch_size=8, shuffle=True)

    def taken(seed):
        return tdecomp.calibrate(model, loader, max_batches=2, seed=seed, progress=False)[""]

    first = taken(5)
    state = torch.get_rng_state()
    torch.rand(3)
    again, other = taken(5), taken(6)
    assert torch.equal(first.matrix, again.matrix)
    assert torch.equal(first.gradient, again.gradient)
    assert not torch.equal(first.matrix, other.matrix)
    torch.set_rng_state(state)
