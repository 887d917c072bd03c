"""The memory that processes share with no other, and the most of it over a stretch of code."""

import os
import threading
import time
from pathlib import Path
from typing import Self


def private_memory(process: int) -> int:
    """The bytes that a process, and those that it started, share with no other.

    They are summed over the pages (Private_* of Linux): the counters that cost less lag behind by
    some megabytes where there are many processors.
    """
    total, family = 0, [process]
    while family:
        one = family.pop()
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            children = Path(f"/proc/{one}/task/{one}/children").read_text().split()
        except OSError:  # it has ended
            continue
        total += sum(1024 * int(ln.split()[1]) for ln in lines if ln.startswith("Private_"))
        family += map(int, children)
    return total


class PrivatePeak:
    """Inside, the private memory of a process (by default this one) is looked at now and then.

    `extra` is the most that was seen, over what it was at the beginning; `seconds` have passed, in
    which this thread had the processor for `processor` seconds. `every` is in seconds: a look takes
    some 10 ms for each gigabyte.
    """

    def __init__(self, process: int | None = None, every: float = 0.02) -> None:
        self._process, self._every = process or os.getpid(), every
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._start = self._peak = 0
        self.seconds = self.processor = 0.0

    @property
    def extra(self) -> int:
        """Bytes over the beginning."""
        return self._peak - self._start

    def __enter__(self) -> Self:
        self._start = self._peak = private_memory(self._process)
        self._began = time.perf_counter(), time.thread_time()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began[0]
        self.processor = time.thread_time() - self._began[1]
        self._ended.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._ended.wait(self._every):
            self._look()

    def _look(self) -> None:
        self._peak = max(self._peak, private_memory(self._process))
