import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tdecomp
from benchmarks.fine_tuning import main
from benchmarks.support.data import Split
from benchmarks.support.factor_training import DECAYS, SCHEDULES, Losses, Training, train
from benchmarks.support.networks import ResNet20


def split(count=64):
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return Split(images, images.mean(dim=(2, 3)).argmax(dim=1), lambda x: x)


def network():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(*layers, nn.Linear(16, 3))
    return tdecomp.decompose(model, "lowrank", rank=4, progress=False).model


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_training_lowers_the_loss_and_is_the_same_for_the_same_seed(schedule):
    losses = []
    for _ in range(2):
        model = network()
        found = train(model, split(), Training(1e-2, schedule, steps=60, batch_size=16))
        assert not model.training
        losses.append(found)
    assert losses[0] == losses[1]
    assert len(losses[0].of_steps) == 60
    assert losses[0].last < 0.7 * losses[0].largest


def test_one_cycle_rises_and_falls():
    rate = SCHEDULES["one-cycle"](Training(1.0, steps=100))
    assert rate(0) == pytest.approx(0.04)
    assert rate(30) == pytest.approx(1.0)
    assert rate(99) < 0.01
    assert SCHEDULES["constant"](Training(1.0))(50) == 1.0


def test_weight_decay_is_of_factors_or_of_their_product():
    model = network()
    chain = model[0]
    first, second = (part.weight.flatten(1) for part in chain)
    found = {name: decay(model, 0.1).item() for name, decay in DECAYS.items()}
    assert found["none"] == 0
    of_factors = 0.05 * (first.square().sum() + second.square().sum()).item()
    assert found["factors"] == pytest.approx(of_factors, rel=1e-5)
    assert found["product"] == pytest.approx(0.05 * (second @ first).square().sum().item(), 1e-5)
    plain = nn.Linear(4, 3)
    assert DECAYS["product"](plain, 2.0).item() == pytest.approx(plain.weight.square().sum().item())


def test_a_loss_that_is_not_finite_is_infinitely_large():
    assert Losses((1.0, math.nan, 2.0)).largest == math.inf


def test_the_command_prints_a_line_for_each_training(folder, tmp_path, capsys):
    file = tmp_path / "resnet20.safetensors"
    save_file(ResNet20().state_dict(), file)
    given = ["--weights", str(file), "--data", str(folder)]
    networks = ["--methods", "original", "svd", "--shares", "0.5", "--fitted", "data"]
    trainings = ["--rates", "1e-3", "--schedules", "constant", "--decays", "none", "product"]
    main([*given, *networks, *trainings, "--steps", "2", "--batch-size", "4"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith(("original", "svd"))]
    assert len(rows) == 8  # as they are found, and in the table
    assert rows[-1][:4] == ["svd", "0.5", "data", "0.001"]
    assert "0.0005 of the product" in "\n".join(lines)
    main([*networks, *trainings, "--steps", "2"])
    assert "* DigitsVGG on handwritten digits, 540 images" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--weights", "nowhere.safetensors", "--data", str(folder)])
    assert "no weights file" in capsys.readouterr().err
