"""The README's ten lines, and what it says they print."""

import re
from pathlib import Path

_TEXT = (Path(__file__).parents[1] / "README.md").read_text()

(FIRST,) = re.findall(r"```python\n(.*?)```", _TEXT, re.S)
(OUTPUT,) = re.findall(r"```text\n(.*?)```", _TEXT, re.S)


def prints_the_output(printed: str) -> bool:
    """Whether this is the table in the README, up to what fits differ by between machines."""
    shown, expected = _words(printed), _words(OUTPUT)
    return len(shown) == len(expected) and all(
        one == other or (isinstance(one, float) and abs(one - other) < 0.02)
        for one, other in zip(shown, expected, strict=True)
    )


def _words(table: str) -> list[str | float]:
    return [float(word) if re.fullmatch(r"0\.\d+", word) else word for word in table.split()]
