"""The workers that a command line can name: processes of this machine, or a Dask cluster's."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager

import torch

from tdecomp.runtime.threads import thread_count


@contextmanager
def executor_of(
    workers: int | None = None, scheduler: str | None = None
) -> Iterator[Executor | None]:
    """This many processes that share the threads of this one; or the workers of a Dask scheduler.

    None for neither. The processes are started anew (spawned): torch hangs in forked ones.
    """
    if scheduler is not None:
        try:
            from dask.distributed import Client
        except ImportError as error:
            raise ImportError(
                f"a scheduler needs Dask ({error}): pip install 'tdecomp-torch[dask]'"
            ) from error
        with Client(scheduler) as client:  # type: ignore[no-untyped-call]
            yield client.get_executor()
    elif workers is not None:
        spawn = multiprocessing.get_context("spawn")
        threads = max(1, thread_count() // workers)
        with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (threads,)) as pool:
            with _interrupts_ignored():
                for _ in range(workers):
                    pool.submit(os.getpid)  # which starts one
            yield pool
    else:
        yield None


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """What is started inside never sees Ctrl-C, which a terminal sends to all processes of a job.

    Only this process acts on it: it cancels what waits. Workers that act on it break their pool.
    """
    if threading.current_thread() is not threading.main_thread():  # where handlers cannot be set
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
