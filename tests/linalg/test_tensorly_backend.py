"""TensorLy's backend: torch within a `with` block and in one thread, and put back after it."""

import threading

import pytest
import tensorly

from tdecomp.linalg.tensorly_backend import torch_backend


def test_the_backend_is_set_for_this_thread_only():
    seen = []
    with torch_backend():
        thread = threading.Thread(target=lambda: seen.append(tensorly.get_backend()))
        thread.start()
        thread.join()
        seen.append(tensorly.get_backend())
    assert seen == ["numpy", "pytorch"]
    assert tensorly.get_backend() == "numpy"


def test_the_backend_is_restored_after_a_failure():
    with pytest.raises(RuntimeError, match="no"), torch_backend():
        raise RuntimeError("no")
    assert tensorly.get_backend() == "numpy"
