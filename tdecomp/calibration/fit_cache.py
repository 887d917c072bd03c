"""Losses and drafts that were computed already, for as long as they may be needed again."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Value = TypeVar("Value")


class FitCache:
    """Values by key, each computed at most once (twice if two threads ask at the same time)."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def get(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """The value of a key, computed if it is not known yet."""
        if key not in self._known:
            self._known[key] = compute()
        value: Value = self._known[key]
        return value

    def known(self, key: Hashable) -> Any:
        """The value of a key if it was computed, else None."""
        return self._known.get(key)
