"""The executors that a command line names."""

import signal
import subprocess
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


_KILLED = """
import os, signal
from tdecomp.runtime.workers import executor_of
with executor_of(workers=1) as executor:
    print(executor.submit(os.getpid).result() != os.getpid(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_end_with_a_parent_that_is_killed():
    # A worker that goes on holds the pipe of the output open.
    done = subprocess.run(
        [sys.executable, "-c", _KILLED], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "True\n")


def test_a_scheduler_without_dask(monkeypatch):
    monkeypatch.setitem(sys.modules, "dask.distributed", None)
    with pytest.raises(ImportError, match=r"pip install 'tdecomp-torch\[dask\]'"):
        executor_of(scheduler="tcp://127.0.0.1:1").__enter__()
