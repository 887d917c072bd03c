"""The README's examples run, and the first prints what stands below it."""

import contextlib
import io
import re
from pathlib import Path

import torch
from torch import nn

README = (Path(__file__).parents[1] / "README.md").read_text()
CODE, OUTPUT = re.findall(
    r"```(?:python)?\n(import torch, tdecomp.*?|layer +method.*?)```", README, re.S
)
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
LATER, PIPELINE, STEPS, TIMES, COMPOSER = (
    next(block for block in BLOCKS if block.startswith(start))
    for start in (
        "plan = tdecomp.plan",
        "from benchmarks.support.data",
        "moments = ",
        "times = ",
        "from torch import",
    )
)


def words(table: str) -> list[str | float]:
    """Every word, decimal numbers as numbers: fits differ in the last digits between machines."""
    return [round(float(w), 2) if re.fullmatch(r"0\.\d+", w) else w for w in table.split()]


def test_the_example_prints_what_the_readme_shows() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(CODE, {})
    shown, expected = words(printed.getvalue()), words(OUTPUT)
    assert len(shown) == len(expected)
    for one, other in zip(shown, expected, strict=True):
        assert one == other or abs(one - other) < 0.02  # type: ignore[operator]


def test_the_second_example_runs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(CODE, names)
        exec(LATER, names)
    assert (tmp_path / "small.safetensors").exists()


def test_the_examples_with_data_run() -> None:
    """On a smaller network of the same inputs: to fit CP to the example's takes half a minute."""
    torch.manual_seed(0)
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec("import torch, tdecomp\nx = torch.randn(1, 1, 8, 8)", names)
        names["model"] = nn.Sequential(
            nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(256, 10),
        )  # fmt: skip
        exec(PIPELINE, names)
        exec(STEPS, names)
        exec(TIMES, names)
    assert "of the original's" in printed.getvalue()
    assert "output error" in printed.getvalue()
    assert "refit: output error" in printed.getvalue()
    assert "distill: output error" in printed.getvalue()


def test_the_example_for_users_of_composer_runs() -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec("import torch\n" + COMPOSER, {})
    assert printed.getvalue().startswith("8 0.")


def test_every_block_is_run_but_the_sketch_of_a_method() -> None:
    assert set(BLOCKS) - {CODE, LATER, PIPELINE, STEPS, TIMES, COMPOSER} == {
        block for block in BLOCKS if block.startswith("@tdecomp.register")
    }
