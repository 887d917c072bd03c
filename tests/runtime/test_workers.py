"""The executors that a command line names."""

import multiprocessing
import sys

import pytest
import torch

from tdecomp.runtime.workers import executor_of


def test_none_without_a_word():
    with executor_of() as executor:
        assert executor is None


def test_processes_that_share_the_threads():
    with executor_of(workers=1) as executor:
        assert executor is not None
        threads = executor.submit(torch.get_num_threads)
        name = executor.submit(multiprocessing.parent_process)
        assert threads.result() == torch.get_num_threads()
        assert name.result() is not None


def test_a_scheduler_without_dask(monkeypatch):
    monkeypatch.setitem(sys.modules, "dask.distributed", None)
    with pytest.raises(ImportError, match=r"pip install 'tdecomp-torch\[dask\]'"):
        executor_of(scheduler="tcp://127.0.0.1:1").__enter__()
