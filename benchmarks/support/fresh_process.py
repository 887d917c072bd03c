"""Measuring in a process of its own: time that nothing else warmed up, memory of nothing else."""

import multiprocessing
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

Result = TypeVar("Result")


def in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """``function(*arguments)`` in a new interpreter; all of them can be pickled."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def in_this_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """The same without the seconds that a new interpreter takes, where nothing is measured."""
    return function(*arguments)


def private_memory(process: int | None = None) -> int:
    """The bytes that a process holds and shares with no file (RssAnon of Linux)."""
    status = Path(f"/proc/{process or 'self'}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


class PrivatePeak:
    """Inside, the private memory of a process is looked at every few milliseconds.

    `extra` is the most that was seen, over what the process held at the beginning; `seconds` have
    passed, in which the thread had the processor for `processor` seconds.
    """

    def __init__(self, process: int | None = None, every: float = 0.005) -> None:
        self._process, self._every = process, every
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.start = self.peak = 0
        self.seconds = self.processor = 0.0

    @property
    def extra(self) -> int:
        """Bytes over the beginning."""
        return self.peak - self.start

    def __enter__(self) -> Self:
        self.start = self.peak = private_memory(self._process)
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
        try:
            self.peak = max(self.peak, private_memory(self._process))
        except (OSError, StopIteration):  # the process has ended
            self._ended.set()
