"""A mask of rows: what counts, where it fits, and what is refused."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tdecomp import Data, calibrate, decompose, refit
from tdecomp.calibration.output_gradients import OutputGradients
from tdecomp.calibration.passes import batches_for
from tdecomp.layers.spec import LayerSpec
from tests.decomposers.oracle import distance

QUIET = {"progress": False}


def sequences(batch=5, length=7, width=6, seed=0):
    """Sequences, and which of their rows count; the others are large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, width, generator=generator)
    mask = torch.rand(batch, length, generator=generator) < 0.6
    return torch.where(mask[..., None], x, 100.0 + x), mask


def tokens(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))


def masked(batches):
    return Data(
        [{"input": x, "mask": m} for x, m in batches], mask=lambda batch: batch["mask"], held_out=0
    )


def forward(model, batch):
    return model(batch["input"])


def check_same(one, other, bound=1e-6):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].count == other[name].count
        assert distance(one[name].mean, other[name].mean) < bound
        for part in ("matrix", "rows", "gradient"):
            a, b = getattr(one[name], part), getattr(other[name], part)
            assert (a is None) == (b is None)
            if a is not None:
                assert distance(a, b) < bound, (name, part)


def test_only_rows_that_count_are_in_the_moments():
    batches = [sequences(seed=seed) for seed in range(2)]
    moments = calibrate(tokens(), masked(batches), forward=forward, gradients=False, **QUIET)
    check_same(
        moments,
        calibrate(tokens(), Data([x[m] for x, m in batches], held_out=0), gradients=False, **QUIET),
    )


def test_a_mask_of_the_batch_drops_whole_samples_of_every_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    x, keep = torch.randn(9, 3, 8, 8), torch.arange(9) % 3 > 0
    data = Data([x], mask=lambda batch: batch.flatten(1).any(1) & keep, held_out=0)
    moments = calibrate(model, data, gradients=False, **QUIET)
    check_same(moments, calibrate(model, Data([x[keep]], held_out=0), gradients=False, **QUIET))


def gradient(name, data):
    """Of many random mixtures of the model's outputs."""
    model = tokens()
    batches = batches_for("test", data, forward=forward, progress=False)
    layer = model.get_submodule(name)
    slopes = OutputGradients({name: (layer, LayerSpec.of(layer))}, batches)
    for batch in batches.on(torch.device("cpu")):
        slopes.add(model, batch, 10**4)
    return slopes.finish()[name]


def test_only_rows_that_count_are_in_the_gradients():
    x, mask = sequences(4000)
    # The gradient at the last layer is the random mixture itself, at each row that counts.
    rows = float(mask.sum()) / len(x)
    assert distance(gradient("2", masked([(x, mask)])), rows * torch.eye(4).double()) < 0.05
    # Rows of other layers act on the outputs of their own row only.
    alone = gradient("0", Data([{"input": x[mask]}], held_out=0))
    assert distance(gradient("0", masked([(x, mask)])), rows * alone) < 0.05


def test_outputs_that_do_not_count_are_not_in_the_gradients():
    """Each output sums up all rows before it: a layer acts on outputs further on, too."""

    def summed(model, batch):
        return model(batch["input"]).cumsum(1)

    x, mask = sequences(300)
    ends = torch.zeros_like(mask)
    ends[:, 0] = True  # the first output depends on the first row alone
    data = masked([(x, ends)])
    moments = calibrate(tokens(), data, forward=summed, **QUIET)
    alone = calibrate(tokens(), Data([x[:, 0]], held_out=0), **QUIET)
    assert distance(moments["2"].gradient, alone["2"].gradient) < 0.4


class Mixed(nn.Module):
    """A Linear on rows, a convolution along them, and a Linear on their mean."""

    def __init__(self):
        super().__init__()
        self.rows, self.along, self.mean = nn.Linear(6, 6), nn.Conv1d(6, 6, 3), nn.Linear(6, 6)

    def forward(self, x):
        x = self.rows(x)
        return self.mean(self.along(x.transpose(1, 2)).mean(2))


def test_all_rows_count_where_the_mask_does_not_fit():
    x, mask = sequences()
    moments = calibrate(Mixed(), masked([(x, mask)]), forward=forward, gradients=False, **QUIET)
    assert {name: m.count for name, m in moments.items()} == {
        "rows": int(mask.sum()),
        "along": 5 * 5,
        "mean": 5,
    }


def test_it_holds_when_layers_are_taken_in_groups():
    x, mask = sequences()
    data = replace(masked([(x, mask)] * 2), max_memory=3000)
    grouped = calibrate(Mixed(), data, forward=forward, gradients=False, **QUIET)
    assert grouped["rows"].count == 2 * int(mask.sum())


def test_refit_solves_for_the_rows_that_count():
    original = tokens()
    batches = [sequences(40, seed=seed) for seed in range(2)]
    model = decompose(original, "svd", rank={"0": 3}, **QUIET).model
    counted = refit(model, original, masked(batches), forward=forward, gradients=False, **QUIET)
    alone = refit(
        model, original, Data([x[m] for x, m in batches], held_out=0), gradients=False, **QUIET
    )
    everything = refit(
        model, original, Data([x for x, _ in batches], held_out=0), gradients=False, **QUIET
    )
    for a, b in zip(counted.model.parameters(), alone.model.parameters(), strict=True):
        assert distance(a, b) < 1e-4
    assert counted.layers["0"] == pytest.approx(alone.layers["0"], rel=1e-4)
    assert counted.layers["0"] != pytest.approx(everything.layers["0"], rel=1e-2)


def test_rows_that_do_not_count_may_be_nan():
    original = tokens()
    model = decompose(original, "svd", rank={"0": 3}, **QUIET).model
    x, mask = sequences(40)
    usual = refit(model, original, masked([(x, mask)]), forward=forward, **QUIET)
    spoilt = torch.where(mask[..., None], x, torch.nan)
    moments = calibrate(original, masked([(spoilt, mask)]), forward=forward, **QUIET)
    assert bool(torch.isfinite(moments["0"].mean).all())

    def only_finite(model, batch):  # the errors of the whole model count all rows
        return model(batch["input"])[batch["mask"]]

    found = refit(
        model, original, masked([(spoilt, mask)]), forward=only_finite, gradients=False, **QUIET
    )
    assert found.layers.keys() == usual.layers.keys()


@pytest.mark.parametrize(
    "mask, words",
    [
        (
            lambda x: x.sum(-1),
            r"the mask returned float32 tensor of shape \(5, 7\); expected a bool",
        ),
        (lambda _: None, "the mask returned NoneType; expected a bool tensor of shape"),
        (lambda _: torch.tensor(True), r"the mask returned bool tensor of shape \(\); expected"),
        (lambda x: x.nonsense, r"the mask failed on a batch .*\(5, 7, 6\).*AttributeError"),
        (lambda x: x[:, :3, 0] > 0, r"the mask, of shape \(5, 3\), keeps no row of any layer's"),
        (lambda x: torch.zeros(x.shape[:2]).bool(), r"the mask, of shape \(5, 7\), keeps no row"),
    ],
    ids=["numbers", "none", "scalar", "fails", "shape", "nothing"],
)
def test_a_mask_that_cannot_be(mask, words):
    original, data = tokens(), Data([sequences()[0]], mask=mask, held_out=0)
    with pytest.raises(ValueError, match=f"calibrate: {words}"):
        calibrate(original, data, **QUIET)
    model = decompose(original, "svd", rank={"0": 3}, **QUIET).model
    with pytest.raises(ValueError, match=r"refit: .*(the mask|no samples that count)"):
        refit(model, original, data, **QUIET)
