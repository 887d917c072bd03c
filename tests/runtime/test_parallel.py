import signal
import threading
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import pytest
import torch

from tdecomp.runtime.parallel import OneThread, on_cpu, parallel_map


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def matrices(n=6):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(i + 2, i + 2, generator=generator) for i in range(n)]


def test_results_are_in_order():
    found = parallel_map(lambda m: len(m), matrices(), size=on_cpu)
    assert found == [2, 3, 4, 5, 6, 7]


def test_workers_have_OneThread_and_record_no_gradients():
    def look(_):
        return torch.get_num_threads(), torch.is_grad_enabled(), threading.current_thread()

    caller = threading.current_thread()
    for threads, gradients, thread in parallel_map(look, matrices(), size=on_cpu):
        assert (threads, gradients) == (1, False)
        assert thread is not caller


def test_threads_made_afterwards_have_all_threads():
    parallel_map(torch.trace, matrices(), size=on_cpu)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [2]


def test_threads_made_afterwards_have_all_threads_beside_another_that_has_one():
    inside, leave = threading.Event(), threading.Event()

    def alone():
        with OneThread():
            inside.set()
            leave.wait(30)

    other = threading.Thread(target=alone)
    other.start()
    inside.wait(30)
    parallel_map(torch.trace, matrices(), size=on_cpu)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2
    leave.set()
    other.join()


def test_two_at_once():
    # Neither gets past the barrier alone.
    barrier = threading.Barrier(2, timeout=30)
    parallel_map(lambda _: barrier.wait(), matrices(2), size=on_cpu)


@pytest.mark.parametrize("threads, items", [(1, 6), (2, 1), (2, 0)])
def test_inline_where_nothing_is_to_be_gained(threads, items):
    torch.set_num_threads(threads)
    found = parallel_map(lambda _: threading.current_thread(), matrices(items), size=on_cpu)
    assert found == [threading.current_thread()] * items
    assert torch.get_num_threads() == threads
    torch.set_num_threads(2)


def test_what_is_large_or_elsewhere_is_the_callers_own():
    order = []

    def look(m):
        order.append(m.numel())
        return threading.current_thread() is threading.main_thread(), torch.get_num_threads()

    elsewhere = torch.empty(2, 2, device="meta")
    items = [torch.ones(2), torch.ones(20), torch.ones(3), elsewhere]
    found = parallel_map(look, items, size=on_cpu, alone=10)
    assert found == [(False, 1), (True, 2), (False, 1), (True, 2)]
    assert order[:2] == [20, 4]


def test_done_is_called_by_the_caller_for_each():
    seen = []

    def done(item, result):
        assert threading.current_thread() is threading.main_thread()
        seen.append((len(item), result))

    parallel_map(len, matrices(), size=on_cpu, done=done)
    assert seen == [(n, n) for n in (2, 3, 4, 5, 6, 7)]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_errors_come_through_and_what_has_not_begun_never_does(error):
    begun = []
    release = threading.Event()

    def work(m):
        begun.append(len(m))
        if len(m) == 2:
            raise error("no")
        release.wait(30)

    def interrupted(future):
        try:
            return future(work, matrices(40), size=on_cpu)
        finally:
            assert torch.get_num_threads() == 2

    timer = threading.Timer(0.2, release.set)
    timer.start()
    with pytest.raises(error, match="no"):
        interrupted(parallel_map)
    assert len(begun) < 40
    timer.join()


def test_nested_calls_are_inline():
    def inner(m):
        here = threading.current_thread()
        return parallel_map(lambda _: threading.current_thread() is here, [m, m], size=on_cpu)

    assert parallel_map(inner, matrices(3), size=on_cpu) == [[True, True]] * 3


def test_one_thread_is_the_callers_own():
    with OneThread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_an_executor_runs_every_item_of_the_processor():
    def work(m):
        assert not torch.is_grad_enabled()
        if len(m) == 5:
            raise ValueError("no")
        return threading.current_thread()

    with ThreadPoolExecutor(1) as executor:
        items = [*matrices(3), torch.empty(2, 2, device="meta")]
        with torch.no_grad():
            found = parallel_map(work, items, size=on_cpu, alone=1, executor=executor)
        assert [thread is threading.current_thread() for thread in found] == [False] * 3 + [True]
        with pytest.raises(ValueError, match="no"):
            parallel_map(work, matrices(40), size=on_cpu, executor=executor)
        assert executor.submit(int, "3").result() == 3  # it is still open


class InPlace(Executor):
    """`submit` runs the item itself."""

    def submit(self, function, *items):
        future = Future()
        future.set_result(function(*items))
        return future


def test_an_executor_that_works_in_place_holds_one_result_at_a_time():
    order = []

    def work(m):
        order.append(("worked", len(m)))

    def done(m, _):
        order.append(("done", len(m)))

    parallel_map(work, matrices(3), size=on_cpu, done=done, executor=InPlace())
    assert order == [(what, n) for n in (2, 3, 4) for what in ("worked", "done")]


def test_ctrl_c_stops_an_executor_that_works_in_place():
    begun = []

    def work(m):
        begun.append(len(m))
        if len(m) == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        parallel_map(work, matrices(), size=on_cpu, executor=InPlace())
    assert begun == [2, 3]


def test_threads_of_torch_are_those_of_before_in_every_thread():
    def sweep():
        parallel_map(torch.trace, matrices(), size=on_cpu)
        return torch.get_num_threads()

    with ThreadPoolExecutor(4) as pool:
        assert {f.result() for f in [pool.submit(sweep) for _ in range(40)]} == {2}
