"""Memory that threads of one process share: each waits until there is room for what it needs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_ROOMS: dict[str, "MemoryRoom"] = {}
_GUARD = threading.Lock()


class MemoryRoom:
    """What is held of a number of bytes that may be held at a time."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._held = 0

    @classmethod
    def of(cls, key: str) -> "MemoryRoom":
        """The one of this process for a key."""
        with _GUARD:
            return _ROOMS.setdefault(key, cls())

    @contextmanager
    def held(self, needed: int, most: int) -> Iterator[None]:
        """Inside, these bytes count as held; it waits until there is room for them.

        What needs more than there ever is goes in alone.
        """
        needed = min(needed, most)
        with self._free:
            while self._held + needed > most:
                self._free.wait(0.1)  # so that Ctrl-C is seen
            self._held += needed
        try:
            yield
        finally:
            with self._free:
                self._held -= needed
                self._free.notify_all()
