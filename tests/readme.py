"""The README's examples, and what it says the first one prints."""

import re
from pathlib import Path

_TEXT = (Path(__file__).parents[1] / "README.md").read_text()

BLOCKS = re.findall(r"```python\n(.*?)```", _TEXT, re.S)
(OUTPUT,) = re.findall(r"```\n(warning: .*?)```", _TEXT, re.S)
FIRST, LATER, PIPELINE, SENSITIVITY, STEPS, QUALITY, TIMES, COMPOSER = (
    next(block for block in BLOCKS if block.startswith(start))
    for start in (
        "import torch, tdecomp",
        "plan = tdecomp.plan",
        "from benchmarks.support.data",
        "table = ",
        "moments = ",
        "images, labels = ",
        "times = ",
        "from torch import",
    )
)


def prints_the_output(printed: str) -> bool:
    """Whether this is the table in the README, up to what fits differ by between machines."""
    shown, expected = _words(printed), _words(OUTPUT)
    return len(shown) == len(expected) and all(
        one == other or (isinstance(one, float) and abs(one - other) < 0.02)
        for one, other in zip(shown, expected, strict=True)
    )


def _words(table: str) -> list[str | float]:
    return [float(word) if re.fullmatch(r"0\.\d+", word) else word for word in table.split()]
