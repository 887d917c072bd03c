"""One function over many items, side by side on the processor's cores or on an executor.

LAPACK's eigensolvers hardly gain from a second thread, so that two of them side by side take half
the time of two in turn with both threads.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
from torch import Tensor

from tdecomp.runtime.scope import Scope, interrupts_deferred
from tdecomp.runtime.torch_state import give_one_thread, thread_count

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    size: Callable[[Item], int],
    done: Callable[[Item, Result], object] = lambda _item, _result: None,
    alone: int = 4_000_000,
    executor: Executor | None = None,
) -> list[Result]:
    """``[function(item) for item in items]``, on one single-threaded worker for each torch thread.

    `function` sees torch's own defaults where settings belong to a thread (autocast, inference
    mode, default device), and nothing is recorded for gradients. If one of the shared items fails,
    those that have not begun never do, and those that have are waited for. `done` is called in the
    caller's thread with each item and its result, as soon as both are there.

    `size` is the number of entries that the function works on for an item; see `on_cpu`. In order,
    the caller's own thread runs the items of size 0 and those above `alone` (their matrix products
    use all threads well, and two of them at once would double the memory). Small operations only
    wait for a second thread, so that little items are shared, too. With an `executor`, it runs
    every item whose size is not 0, and is not shut down.
    """
    threads = thread_count()
    if executor is not None:
        shared = [i for i, item in enumerate(items) if size(item)]
    else:
        shared = [i for i, item in enumerate(items) if 0 < size(item) <= alone]
        shared = [] if threads == 1 or len(shared) < 2 else shared
    results: dict[int, Result] = {}

    def finish(index: int, result: Result) -> None:
        results[index] = result
        done(items[index], result)

    for index in sorted(set(range(len(items))) - set(shared)):
        finish(index, function(items[index]))
    if shared:
        futures: list[Future[Result]] = []
        workers = min(threads, len(shared))
        with Scope() as submitted:
            runner = executor or ThreadPoolExecutor(workers, initializer=give_one_thread)
            if executor is None:
                submitted.undo.callback(runner.shutdown)
            submitted.undo.callback(_finish, futures)
            with interrupts_deferred():  # a thread interrupted at its start would be on its own
                for i in shared:
                    futures.append(runner.submit(_without_gradients, function, items[i]))
            for index, future in zip(shared, futures, strict=True):
                finish(index, future.result())
    return [results[i] for i in range(len(items))]


def in_single_threads(sizes: Sequence[int], *, alone: int = 4_000_000) -> list[bool]:
    """Which items of these sizes `parallel_map` runs on single-threaded workers of its own.

    Whoever runs some of them only, later, can give them as many threads as they would have had.
    """
    shared = [0 < size <= alone for size in sizes]
    return shared if thread_count() > 1 and sum(shared) > 1 else [False] * len(shared)


class OneThread(Scope):
    """Inside, torch has one thread: small operations only wait for others."""

    def change(self) -> None:
        self.undo.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)


def on_cpu(tensor: Tensor) -> int:
    """The number of the tensor's entries if it is in the processor's memory, else 0."""
    return tensor.numel() if tensor.device.type == "cpu" else 0


def _finish(futures: Sequence[Future[Any]]) -> None:
    """None of them waits or runs afterwards."""
    for future in futures:
        future.cancel()
    wait(futures)


def _without_gradients(function: Callable[[Item], Result], item: Item) -> Result:
    with torch.no_grad():
        return function(item)
