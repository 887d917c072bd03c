"""The one bar: what it says, that it is one, and that it is gone in the end."""

import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.runtime.progress import Progress


def lines(capsys):
    """What stood in the line of the bar, one after the other; nothing stands elsewhere."""
    out, err = capsys.readouterr()
    assert out == ""
    assert "\n" not in err
    return [text for line in err.split("\r") if (text := line.strip())]


def test_a_step_says_what_goes_on_how_much_is_done_and_the_words(capsys):
    with Progress(True, 0).step("fit", 3, "layers", words="about a minute") as step:
        step.advance()
        step.advance("error 0.1")
        step.advance()
    shown = lines(capsys)
    assert shown[0].startswith("fit:   0%")
    assert "about a minute" in "".join(shown[:3])
    assert any("2/3 layers" in line and "left, error 0.1]" in line for line in shown)
    assert "100%" in shown[-1]


def test_a_step_within_another_is_told_beside_it(capsys):
    progress = Progress(True, 0)
    with progress.step("search", 2, "models") as search:
        for _ in progress.over("ab", "fit", 2, "layers"):
            pass
        search.advance()
    shown = lines(capsys)
    assert all(line.startswith("search:") for line in shown)
    assert any("0/2 models" in line and "fit 1/2 layers" in line for line in shown)
    assert "fit" not in shown[-1]


def test_work_tells_how_far_it_is(capsys):
    with Progress(True, 0).step("fit", 2, "layers", work=100) as step:
        step.advance(work=90)
    assert any("90%" in line and "1/2 layers" in line for line in lines(capsys))


def test_a_number_that_is_not_known_is_counted(capsys):
    for _ in Progress(True, 0).over(iter("abc"), "calibrate", unit="batches"):
        pass
    assert any(line.startswith("calibrate: 2 batches [00:00") for line in lines(capsys))


def test_a_bar_that_is_not_shown_is_silent(capsys):
    progress = Progress(False)
    with progress.step("search", 2, "models") as step:
        assert list(progress.over("ab", "fit", 2)) == ["a", "b"]
        step.advance("words")
    assert capsys.readouterr() == ("", "")


def test_an_error_ends_every_step(capsys):
    progress = Progress(True, 0)
    items = progress.over("ab", "fit", 2, "layers")

    def fail():
        with progress.step("search", 2, "models"):
            next(items)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    next(items)  # a step that goes on after the one around it is not shown any more
    with progress.step("later", 2, "models"):
        pass
    assert lines(capsys)[-1].startswith("later:")


X = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))


def test_all_of_a_call_is_in_one_line(capsys):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    steps = ["refit", "reconstruct", tdecomp.Distill(steps=3)]
    budget = tdecomp.Budget(macs=0.5)
    tdecomp.decompose(model, "svd", rank=budget, data=[X], example_inputs=X, recover=steps)
    titles = list(dict.fromkeys(re.split(r":| \[", line)[0] for line in lines(capsys)))
    assert titles == [
        "calibrate", "plan", "choose ranks", "fit", "refit", "reconstruct", "distill",
        "time both models",
    ]  # fmt: skip


def test_a_search_shows_its_own_bar_with_what_goes_on_within(capsys):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    quality = tdecomp.Quality(lambda _: 1.0, drop=1)
    tdecomp.compress_to(model, quality, "svd", data=[X], example_inputs=X)
    shown = [line for line in lines(capsys) if line.startswith("compress_to:")]
    assert "0/8 evaluations" in shown[0]
    assert any("of the MACs" in line and "fit 0/2 layers" in line for line in shown)
    assert any(" will do" in line for line in shown)


def test_a_notebook_without_widgets_is_no_warning():
    code = """
import sys, types, warnings
warnings.simplefilter("error")
sys.modules["ipykernel.zmqshell"] = types.ModuleType("ipykernel.zmqshell")
sys.modules["IPython"] = types.SimpleNamespace(get_ipython=lambda: None)
sys.modules["ipywidgets"] = None
from tdecomp.runtime.progress import Progress
with Progress(True).step("fit", 1, "layers"):
    pass
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fit:   0%" in done.stderr
