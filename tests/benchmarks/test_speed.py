"""One command, all lines; the plain loops find what ours does."""

import pytest
import torch
from torch import nn

from benchmarks import speed
from benchmarks.support import model_fits
from benchmarks.support.machine import peak_memory
from benchmarks.support.pairs import HEADERS, Sides, in_turns, row


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(12, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3))
    for module in (model[0], model[2]):
        model_fits.plant(module)
    return model


def test_turns():
    order = []
    ways = {"a": lambda: order.append("a") or 1, "b": lambda: order.append("b") or 2}
    sides = in_turns(ways, lambda: order.append("plain") or 3, repeats=2)
    assert order == ["a", "b", "plain", "plain", "b", "a"]
    assert (sides["a"].found, sides["b"].found, sides["b"].found_plainly) == (1, 2, 3)
    assert len(sides["a"].ours) == len(sides["b"].plain) == 2


def test_a_row_has_median_spread_and_bounds():
    sides = Sides((1.0, 2.0, 4.0), (10.0, 24.0, 8.0), None, None)
    cells = row("t", "w", sides, at_least=6, errors=(0.505, 0.5), worse=1.01, peak=2e9)
    assert len(cells) == len(HEADERS)
    assert cells[2:6] == ["2.00 (1.00–4.00)", "10.00 (8.00–24.00)", "10.00 (2.00–12.00)", "≥ 6"]
    assert cells[6:] == ["0.5050", "0.5000", "1.0100", "≤ 1.01", "2.00"]


@pytest.mark.parametrize("case", model_fits.CASES[:2], ids=lambda case: case.title)
def test_plain_loops_find_the_same(case):
    cells = model_fits.measured(case, 1, small(), peak=1e9)
    assert cells[6] != "0.0000"
    assert float(cells[8]) == pytest.approx(1.0, abs=1e-3)
    assert cells[10] == "1.00"


LINE = ["a case", *["x"] * (len(HEADERS) - 1)]
SECTIONS = {"kernels": lambda *_: iter([LINE])}


def test_the_table(capsys):
    threads = torch.get_num_threads()
    speed.main(["--repeat", "1", "--sections", "kernels", "--threads", str(threads)], SECTIONS)
    assert "a case" in capsys.readouterr().out


def test_trained_networks_are_told_of(capsys):
    given = []
    speed.main(
        ["--data", "images", "--weights", "resnet20=a", "vgg11_bn=b"], SECTIONS, given.append
    )
    speed.main(["--sections", "kernels"], SECTIONS, given.append)
    assert given == [["--data", "images", "--weights", "resnet20=a", "vgg11_bn=b"]]
    assert "a case" in capsys.readouterr().out


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory()
    held = torch.ones(before // 4 + 10_000_000)
    assert peak_memory() > before + 20_000_000
    assert len(held) > 0
