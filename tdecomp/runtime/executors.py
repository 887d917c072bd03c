"""What a user may give as `executor`, and what differs between executors."""

import warnings
from collections.abc import Callable
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
)
from typing import Any

_EXPECTED = (
    "a concurrent.futures.ThreadPoolExecutor, a ProcessPoolExecutor whose workers are spawned, or "
    "client.get_executor() of a Dask client"
)
# Items that wait in Dask's scheduler, as pickled: some for each thread, so that none is idle.
_FOR_EACH_THREAD, _LEAST = 2, 8


def check_executor(executor: Any) -> None:
    """Refuse what is no executor, forks, or was shut down; begin to start its workers."""
    if executor is None:
        return
    if not isinstance(executor, Executor):
        hint = (
            f" (a class: make one, {executor.__name__}(...))" if isinstance(executor, type) else ""
        )
        raise TypeError(f"executor: expected {_EXPECTED}, got {type(executor).__name__}{hint}")
    if isinstance(executor, ProcessPoolExecutor) and _forks(executor):
        raise ValueError(
            "executor: got a ProcessPoolExecutor that forks this process, in which torch's threads "
            "may hold locks that the workers then wait for without end; expected spawned workers: "
            "ProcessPoolExecutor(mp_context=multiprocessing.get_context('spawn'))"
        )
    try:
        begun = executor.submit(_start)
        if isinstance(executor, ProcessPoolExecutor):
            begun.result()  # a worker that cannot start says so now, and disturbs no measurement
    except Exception as error:
        if not _takes_nothing(error):
            raise
        words = f"executor: expected one that can run something, but {{}} ({error})"
        if isinstance(error, BrokenExecutor):
            raise ValueError(
                f"{words.format('its workers died')}; make a new one. In a script, do so below "
                "`if __name__ == '__main__':`, as spawned workers import the script"
            ) from error
        raise ValueError(
            f"{words.format('it was shut down')}; make a new one, or call this inside of its "
            "`with` block"
        ) from error


def _start() -> None:
    """The first thing that a worker does, which is to import this."""


def _forks(pool: ProcessPoolExecutor) -> bool:
    context: Any = getattr(pool, "_mp_context", None)  # there is no public way to ask
    return context is not None and context.get_start_method() == "fork"


def most_ahead(executor: Executor) -> int | None:
    """How many items to submit before the first is done; None for all.

    Pools pickle an item when a worker is about to take it, Dask when it is submitted: its scheduler
    would hold all weights of a model at once.
    """
    client = _dask_client(executor)
    if client is None:
        return None
    threads: dict[str, int] = client.nthreads()
    return max(_LEAST, _FOR_EACH_THREAD * sum(threads.values()))


def _dask_client(executor: Executor) -> Any:
    return getattr(executor, "_client", None) if _is_of_dask(executor) else None


def _is_of_dask(value: object) -> bool:
    return type(value).__module__.partition(".")[0] == "distributed"


def submit(executor: Executor, function: Callable[..., Any], *items: Any) -> Future[Any]:
    """`executor.submit`; the future of an executor that can take nothing any more has its error."""
    try:
        if not _is_of_dask(executor):
            return executor.submit(function, *items)
        with warnings.catch_warnings():
            # Dask says so of every item above 10 MB; this is how it is meant.
            warnings.filterwarnings("ignore", "Sending large graph", UserWarning)
            return executor.submit(function, *items)
    except Exception as error:
        if not _takes_nothing(error):
            raise
        lost: Future[Any] = Future()
        lost.set_exception(BrokenExecutor(*error.args))
        return lost


def _takes_nothing(error: Exception) -> bool:
    """Whether an executor said by this error that it was shut down or broke, or its client did."""
    return isinstance(error, RuntimeError) or _is_of_dask(error)


def is_lost(error: Exception) -> bool:
    """Whether a worker was lost, and with it what it did, rather than that this failed."""
    return isinstance(error, (BrokenExecutor, CancelledError)) or _is_of_dask(error)
