"""One function over many items, side by side on the processor's cores or on an executor.

LAPACK's eigensolvers hardly gain from a second thread, so that two of them side by side take half
the time of two in turn with both threads.
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from tdecomp.runtime.executors import is_lost, most_ahead, submit
from tdecomp.runtime.parcel import Parcel
from tdecomp.runtime.scope import Scope, interrupts_deferred, raise_pending_interrupt
from tdecomp.runtime.threads import give_one_thread, thread_count

Item = TypeVar("Item")
Result = TypeVar("Result")
# The entries of an item above which the caller's own thread runs it with all threads of torch.
_ALONE = 4_000_000


def parallel_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    size: Callable[[Item], int],
    done: Callable[[Item, Result], object] = lambda _item, _result: None,
    alone: int = _ALONE,
    executor: Executor | None = None,
) -> list[Result]:
    """``[function(item) for item in items]``, as `parallel_each` runs them."""
    found: dict[int, Result] = {}

    def keep(place: int, result: Result) -> None:
        found[place] = result
        done(items[place], result)

    _run_each(function, items, size, keep, alone, executor)
    return [found[place] for place in range(len(items))]


def parallel_each(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    size: Callable[[Item], int],
    done: Callable[[Item, Result], object],
    alone: int = _ALONE,
    executor: Executor | None = None,
) -> None:
    """``done(item, function(item))`` for each, on one single-threaded worker for each torch thread.

    `function` sees torch's own defaults where settings belong to a thread (autocast, inference
    mode, default device), and nothing is recorded for gradients. If one of the shared items fails,
    those that have not begun never do, and those that have are waited for. `done` is called in the
    caller's thread, as soon as an item and those shared before it are there; no result is kept.

    `size` is the number of entries that the function works on for an item; see `on_cpu`. In order,
    the caller's own thread runs the items of size 0 and those above `alone` (their matrix products
    use all threads well, and two of them at once would double the memory). Small operations only
    wait for a second thread, so that little items are shared, too.

    With an `executor`, it runs every item whose size is not 0, and is not shut down. Its workers
    keep the number of threads that torch has in them. For workers that are other processes the
    function stands at the top level of a module; items and results travel as a `Parcel`. What a
    lost worker had to do is done in this process, with a warning.
    """

    def hand_over(place: int, result: Result) -> None:
        done(items[place], result)

    _run_each(function, items, size, hand_over, alone, executor)


def _run_each(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    size: Callable[[Item], int],
    done: Callable[[int, Result], object],
    alone: int,
    executor: Executor | None,
) -> None:
    threads = thread_count()
    if executor is not None:
        shared = [i for i, item in enumerate(items) if size(item)]
    else:
        shared = [i for i, item in enumerate(items) if 0 < size(item) <= alone]
        shared = [] if threads == 1 or len(shared) < 2 else shared
    for place in sorted(set(range(len(items))) - set(shared)):
        done(place, function(items[place]))
    if executor is not None:
        send = partial(submit, executor)
        lost = _share(function, items, shared, done, send, most_ahead(executor))
    elif shared:
        with Scope() as pool:
            threads = thread_count()
            workers = min(threads, len(shared))
            local = ThreadPoolExecutor(workers, initializer=give_one_thread, initargs=(threads,))
            pool.undo.callback(local.shutdown)
            lost = _share(function, items, shared, done, local.submit)
    else:
        return
    again = [items[place] for place in lost]
    if again:
        _run_each(function, again, size, lambda i, result: done(lost[i], result), alone, None)


def _share(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    places: Sequence[int],
    done: Callable[[int, Result], object],
    send: Callable[..., Future[Any]],
    most: int | None = None,
) -> list[int]:
    """Submit the items at these places, `most` ahead; the places that were lost with a worker."""
    waiting, begun = deque(places), deque[tuple[int, Future[Parcel[Result]]]]()
    lost: dict[int, Exception] = {}
    with Scope() as submitted:
        submitted.undo.callback(_finish, begun)
        while waiting or begun:
            running = [] if most is None else [f for _, f in begun if not f.done()]
            if waiting and (most is None or len(running) < most) and not _caught_up(begun):
                with interrupts_deferred():  # a thread interrupted at its start would be on its own
                    place = waiting.popleft()
                    begun.append((place, send(_opened, function, Parcel(items[place]))))
                raise_pending_interrupt()  # which came while `submit` itself ran the item
                continue
            place, future = begun[0]
            if waiting and not future.done():
                wait(running, None, FIRST_COMPLETED)
                continue
            try:
                result = future.result().open()
            except Exception as error:
                if not is_lost(error):
                    raise
                lost[place] = error
            else:
                done(place, result)
            begun.popleft()
    if lost:
        reasons = {f"{type(error).__name__}: {error}": None for error in lost.values()}
        warnings.warn(
            f"executor: workers were lost ({'; '.join(reasons)}); what {len(lost)} of "
            f"{len(places)} items needed is done in this process",
            stacklevel=2,
        )
    return list(lost)


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


def _caught_up(begun: Sequence[tuple[int, Future[Any]]]) -> bool:
    """Whether results are there, the latest too: always so where `submit` itself runs the item."""
    return bool(begun) and begun[0][1].done() and begun[-1][1].done()


def _finish(begun: Iterable[tuple[int, Future[Any]]]) -> None:
    """None of them waits or runs afterwards."""
    wait([future for _, future in begun if not future.cancel()])


def _opened(function: Callable[[Item], Result], parcel: Parcel[Item]) -> Parcel[Result]:
    """The function's result, without gradients; what is sent to a worker."""
    item = parcel.open()
    with torch.no_grad():
        return Parcel(function(item), made_of=parcel)
