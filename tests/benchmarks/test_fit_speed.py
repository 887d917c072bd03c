"""One command, a line for each network, and factors that a plain loop finds."""

import pytest
import torch
from torch import nn

from benchmarks import fit_speed
from benchmarks.support.wide_networks import smooth_images


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3)).eval()


def few_images():
    return smooth_images(4, 16, at_a_time=2)


CASE = fit_speed.Case("small", small, few_images, "dense", refit=True, bound="none")


def test_the_table(capsys):
    threads = str(torch.get_num_threads())
    fit_speed.main(["--only", "small", "--threads", threads], [CASE])
    assert "small" in capsys.readouterr().out


@pytest.mark.parametrize("side", [5, 16])
def test_the_plain_loop_finds_what_lowrank_does(side):
    model, batches = small(), smooth_images(3, side, at_a_time=1)
    (out, into) = fit_speed.plain_loop(model, batches)["2"]
    inputs = []
    with torch.no_grad():
        for batch in batches:
            inputs.append(nn.functional.unfold(model[1](model[0](batch)), 3))
    rows = torch.cat(list(torch.cat(inputs).movedim(1, -1)))  # (patches, in · kernel)
    kernel = model[2].weight.detach().flatten(1)
    found = (out @ into).reshape(12, 9, 8).transpose(1, 2).flatten(1)
    lost = (rows @ (kernel - found).T).square().sum()
    best = torch.linalg.svdvals(rows @ kernel.T)[out.shape[1] :].square().sum()
    assert lost <= 1.01 * best + 1e-6
