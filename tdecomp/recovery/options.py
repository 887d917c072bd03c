"""Checks of the options that steps which train have in common."""

import math
from typing import Any


def check_training(caller: str, lr: Any, **counts: Any) -> None:
    """Raise a ValueError for a rate, or a named count, that is out of range; None is by default."""
    for name, count in counts.items():
        if count is not None and not (type(count) is int and count >= 1):
            raise ValueError(f"{caller}: expected {name} of at least 1, got {count!r}")
    number = isinstance(lr, (int, float)) and not isinstance(lr, bool)
    if lr is not None and not (number and 0 < lr < math.inf):
        raise ValueError(f"{caller}: expected a finite rate above 0, got lr={lr!r}")
