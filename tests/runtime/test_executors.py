import multiprocessing
import os
import signal
import threading
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor

import pytest
import torch

from tdecomp.runtime.executors import check_executor
from tdecomp.runtime.parallel import on_cpu, parallel_each, parallel_map
from tests.posting import Posting


def matrices(n=6):
    return [torch.ones(i + 2, i + 2) for i in range(n)]


@pytest.mark.parametrize("wrong", [2, "threads", map, ThreadPoolExecutor])
def test_what_is_no_executor_is_refused(wrong):
    with pytest.raises(TypeError, match=r"executor: expected .*ThreadPoolExecutor.*got"):
        check_executor(wrong)


def test_a_class_is_told_from_its_instance():
    with pytest.raises(TypeError, match=r"make one, ThreadPoolExecutor\(\.\.\.\)"):
        check_executor(ThreadPoolExecutor)


def test_a_pool_that_forks_is_refused():
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, fork) as pool, pytest.raises(ValueError, match="'spawn'"):
        check_executor(pool)


def test_an_executor_that_was_shut_down_is_refused():
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with pytest.raises(ValueError, match=r"executor: .*it was shut down .*make a new one"):
        check_executor(pool)


class Broken(Posting):
    """Its workers die at the item that has so many rows, and with them the executor."""

    rows, broken = 4, False

    def submit(self, function, *items):
        if self.broken:
            raise BrokenExecutor("a child died")
        if items and len(items[-1].open()) == self.rows:
            self.broken = True
            future = Future()
            future.set_exception(BrokenExecutor("a child died"))
            return future
        return super().submit(function, *items)


def test_a_pool_whose_workers_cannot_start_is_refused():
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, spawn, os._exit, (1,)) as pool,
        pytest.raises(ValueError, match=r"its workers died .*__main__"),
    ):
        check_executor(pool)


def test_a_broken_executor_is_refused():
    pool = Broken()
    pool.broken = True
    with pytest.raises(ValueError, match=r"its workers died .*make a new one"):
        check_executor(pool)


def test_what_a_lost_worker_had_to_do_is_done_here():
    executor, seen = Broken(), []
    with pytest.warns(UserWarning, match=r"workers were lost \(.*died\); what 4 of 6 items"):
        found = parallel_map(
            len, matrices(), size=on_cpu, executor=executor, done=lambda _, n: seen.append(n)
        )
    assert found == sorted(seen) == [2, 3, 4, 5, 6, 7]
    assert len(executor.sent) == 2


def test_an_executor_that_is_shut_down_meanwhile_leaves_the_rest_here():
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with pytest.warns(UserWarning, match="shutdown.*what 3 of 3 items"):
        assert parallel_map(len, matrices(3), size=on_cpu, executor=pool) == [2, 3, 4]


class FakeClient:
    def nthreads(self):
        return {"one": 1, "another": 1}


class Scheduler(ThreadPoolExecutor):
    """What Dask's executor is known by; counts what it holds."""

    def __init__(self):
        super().__init__(2)
        self._client, self.held, self.most, self.lock = FakeClient(), 0, 0, threading.Lock()

    def submit(self, function, *items):
        with self.lock:
            self.held += 1
            self.most = max(self.most, self.held)
        future = super().submit(function, *items)
        future.add_done_callback(lambda _: self.give())
        return future

    def give(self):
        with self.lock:
            self.held -= 1


Scheduler.__module__ = "distributed.cfexecutor"


def test_a_scheduler_holds_some_items_for_each_worker_and_no_more():
    with Scheduler() as executor:
        found = parallel_map(len, matrices(40), size=on_cpu, executor=executor)
    assert found == [*range(2, 42)]
    assert 2 < executor.most <= 8


def test_ctrl_c_cancels_what_waits_and_waits_for_what_runs():
    begun, ended, main = [], [], threading.main_thread().ident

    def work(m):
        begun.append(len(m))
        if len(begun) == 2:
            signal.pthread_kill(main, signal.SIGINT)
        release.wait(30)
        ended.append(len(m))

    release = threading.Event()
    timer = threading.Timer(0.2, release.set)
    timer.start()
    with ThreadPoolExecutor(2) as executor:
        with pytest.raises(KeyboardInterrupt):
            parallel_each(work, matrices(40), size=on_cpu, done=lambda *_: None, executor=executor)
        assert sorted(begun) == sorted(ended)
        assert len(begun) < 40
        assert executor.submit(int, "3").result() == 3  # it is still open
    timer.join()
