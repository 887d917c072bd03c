"""One function over many items, side by side on the processor's cores or on an executor.

LAPACK's eigensolvers hardly gain from a second thread, so that two of them side by side take half
the time of two in turn with both threads.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
from torch import Tensor

from tdecomp.scope import Scope
from tdecomp.torch_state import give_one_thread, thread_count

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    size: Callable[[Item], int],
    done: Callable[[Item, Result], object] = lambda _item, _result: None,
    little: int = 100_000,
    alone: int = 4_000_000,
    executor: Executor | None = None,
) -> list[Result]:
    """``[function(item) for item in items]``, on one single-threaded worker for each torch thread.

    `function` sees torch's own defaults where settings belong to a thread (autocast, inference
    mode, default device), and nothing is recorded for gradients. If one of the shared items fails,
    those that have not begun never do, and those that have are waited for.

    Parameters
    ----------
    size : callable
        The number of entries that the function works on for an item; see `on_cpu`. Items of size 0
        are left to the caller's own thread, in order.
    done : callable, optional
        Called in the caller's thread with each item and its result, as soon as both are there.
    little : int
        Smaller items are left to the caller's thread, too: most of their time goes to Python
        itself, which only one thread runs at a time.
    alone : int
        And so are larger ones: most of their time goes to matrix products, which use all threads
        well, and two of them at once would double the memory.
    executor : concurrent.futures.Executor, optional
        Runs every item whose size is not 0, in place of threads of this process; not shut down.
    """
    threads = thread_count()
    if executor is not None:
        shared = [i for i, item in enumerate(items) if size(item)]
    else:
        shared = [i for i, item in enumerate(items) if little <= size(item) <= alone]
        shared = [] if threads == 1 or len(shared) < 2 else shared
    results: dict[int, Result] = {}

    def finish(index: int, result: Result) -> None:
        results[index] = result
        done(items[index], result)

    for index in sorted(set(range(len(items))) - set(shared)):
        finish(index, function(items[index]))
    if shared:
        with _Submitted(executor, min(threads, len(shared))) as submitted:
            futures = [submitted.run(function, items[i]) for i in shared]
            for index, future in zip(shared, futures, strict=True):
                finish(index, future.result())
    return [results[i] for i in range(len(items))]


def on_cpu(tensor: Tensor) -> int:
    """The number of the tensor's entries if it is in the processor's memory, else 0."""
    return tensor.numel() if tensor.device.type == "cpu" else 0


class _Submitted(Scope):
    """Items given to an executor, or to a pool of threads; afterwards none waits or runs."""

    def __init__(self, executor: Executor | None, workers: int) -> None:
        super().__init__()
        self._executor = executor or ThreadPoolExecutor(workers, initializer=give_one_thread)
        self._futures: list[Future[Any]] = []
        if executor is None:
            self.undo.callback(self._executor.shutdown)
        self.undo.callback(self._finish)

    def run(self, function: Callable[[Item], Result], item: Item) -> Future[Result]:
        future = self._executor.submit(_without_gradients, function, item)
        self._futures.append(future)
        return future

    def _finish(self) -> None:
        for future in self._futures:
            future.cancel()
        wait(self._futures)


def _without_gradients(function: Callable[[Item], Result], item: Item) -> Result:
    with torch.no_grad():
        return function(item)
