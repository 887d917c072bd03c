import pytest
import torch
from torch import nn

from benchmarks.support.data import Normalisation, Split
from benchmarks.support.networks import DigitsVGG
from benchmarks.support.training import accuracy, fine_tune
from benchmarks.train_digits import main, shifted


def two_colours(n: int = 40) -> Split:
    """Dark images of class 0 and bright ones of class 1."""
    labels = torch.arange(n) % 2
    images = (labels * 200).to(torch.uint8).view(n, 1, 1, 1).repeat(1, 1, 2, 2)
    return Split(images, labels, Normalisation(255.0, (0.5,), (0.5,)))


def classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2))


def test_accuracy_counts_right_labels():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.tensor([[0.0, 1.0]]).repeat(len(x), 1)

    assert accuracy(Constant(), two_colours(10), batch_size=4) == 0.5


def test_fine_tuning_learns_and_leaves_eval_mode():
    model = classifier()
    fine_tune(model, two_colours(), steps=100, batch_size=8, learning_rate=0.01)
    assert not model.training
    assert accuracy(model, two_colours()) == 1.0


def test_fine_tuning_is_the_same_for_the_same_seed():
    weights = []
    for seed in (0, 0, 1):
        model = classifier()
        fine_tune(model, two_colours(), steps=3, batch_size=8, seed=seed)
        weights.append(model[1].weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_shifted_moves_by_at_most_a_pixel():
    x = torch.zeros(200, 1, 8, 8)
    x[:, :, 4, 4] = 1
    y = shifted(x, torch.Generator().manual_seed(0))
    assert y.shape == x.shape
    assert torch.equal(y.sum((1, 2, 3)), torch.ones(200))
    rows, columns = y.nonzero()[:, 2:].unbind(1)
    assert set(rows.tolist()) == set(columns.tolist()) == {3, 4, 5}


@pytest.mark.slow
def test_the_training_script_writes_weights_that_load(tmp_path, capsys):
    main(["--epochs", "1", "--out", str(tmp_path / "w.safetensors")])
    assert "held-out images" in capsys.readouterr().out
    from benchmarks.support.models import read_state_dict

    DigitsVGG().load_state_dict(read_state_dict(tmp_path / "w.safetensors"))
