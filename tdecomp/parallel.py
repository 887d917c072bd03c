"""One function over many tensors, side by side on the processor's cores.

LAPACK's eigensolvers hardly gain from a second thread, so that two of them side by side take half
the time of two in turn with both threads.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")

# Entries above which an item is worked on alone, with all threads: matrix products, which use them
# well, are most of its time, and two such at once would double the memory.
_ALONE = 4_000_000
# Entries below which most of the time goes to Python itself, which only one thread runs at a time:
# two of them side by side would take longer than in turn.
_LITTLE = 100_000


def parallel_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    size: Callable[[Item], int],
    done: Callable[[Item, Result], object] = lambda _item, _result: None,
) -> list[Result]:
    """``[function(item) for item in items]``, on one single-threaded worker for each torch thread.

    >>> parallel_map(torch.trace, [torch.eye(2), torch.eye(3)], size=on_cpu)
    [tensor(2.), tensor(3.)]

    What an item's result is does not depend on the others, nor on which of them is done first.

    Parameters
    ----------
    function : callable
        Sees torch's own defaults where settings belong to a thread (autocast, inference mode,
        default device), except that nothing is recorded for gradients.
    items : sequence
    size : callable
        Entries that an item's function works on; see `on_cpu`. Those that count 0 are left to the
        caller's own thread, in order.
    done : callable, optional
        Called in the caller's thread with each item and its result, as soon as both are there.

    Raises
    ------
    Exception
        Whatever the function raises, for the first item of those side by side that fails. Items
        that have not begun by then, or by an interrupt, never do.
    """
    threads = torch.get_num_threads()
    shared = [i for i, item in enumerate(items) if _LITTLE <= size(item) <= _ALONE]
    if threads == 1 or len(shared) < 2:
        shared = []
    results: dict[int, Result] = {}

    def finish(index: int, result: Result) -> None:
        results[index] = result
        done(items[index], result)

    beside = set(shared)
    for index, item in enumerate(items):
        if index not in beside:
            finish(index, function(item))
    if shared:
        pool = ThreadPoolExecutor(min(threads, len(shared)), initializer=_single_threaded)
        try:
            futures = [pool.submit(_without_gradients, function, items[i]) for i in shared]
            for index, future in zip(shared, futures, strict=True):
                finish(index, future.result())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            # Torch hands the workers' setting on to every thread that is made from now on.
            torch.set_num_threads(threads)
    return [results[i] for i in range(len(items))]


def on_cpu(tensor: Tensor) -> int:
    """The tensor's entries if they are the processor's to work on, else 0."""
    return tensor.numel() if tensor.device.type == "cpu" else 0


def _single_threaded() -> None:
    torch.set_num_threads(1)


def _without_gradients(function: Callable[[Item], Result], item: Item) -> Result:
    with torch.no_grad():
        return function(item)
