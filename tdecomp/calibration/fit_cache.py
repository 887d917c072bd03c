"""Losses and drafts that were computed already, for as long as somebody may ask for them again."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Value = TypeVar("Value")


class FitCache:
    """Values by key, each computed at most once (twice if two threads ask at the same time).

    >>> cache = FitCache()
    >>> cache.get("answer", lambda: 42), cache.get("answer", lambda: 43)
    (42, 42)
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def get(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """The value of a key, computed where it is not known yet."""
        if key not in self._known:
            self._known[key] = compute()
        value: Value = self._known[key]
        return value

    def known(self, key: Hashable) -> Any:
        """The value of a key if it was computed, else None."""
        return self._known.get(key)

    def __len__(self) -> int:
        return len(self._known)
