"""The executors that a command line names."""

import signal
import sys

import pytest
import torch

from tdecomp.runtime.workers import executor_of


def test_none_without_a_word():
    with executor_of() as executor:
        assert executor is None


def test_processes_share_the_threads_and_leave_interrupts_to_this_one():
    before = signal.getsignal(signal.SIGINT)
    with executor_of(workers=1) as executor:
        assert executor is not None
        assert signal.getsignal(signal.SIGINT) is before
        threads = executor.submit(torch.get_num_threads)
        handler = executor.submit(signal.getsignal, signal.SIGINT)
        assert threads.result() == torch.get_num_threads()
        assert handler.result() is signal.SIG_IGN


def test_a_scheduler_without_dask(monkeypatch):
    monkeypatch.setitem(sys.modules, "dask.distributed", None)
    with pytest.raises(ImportError, match=r"pip install 'tdecomp-torch\[dask\]'"):
        executor_of(scheduler="tcp://127.0.0.1:1").__enter__()
