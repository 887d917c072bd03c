"""The README's example runs, and prints what stands below it."""

import contextlib
import io
import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()
CODE, OUTPUT = re.findall(
    r"```(?:python)?\n(import torch, tdecomp.*?|layer +method.*?)```", README, re.S
)
LATER = re.findall(r"```python\n(plan = tdecomp.plan.*?)```", README, re.S)[0]


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
