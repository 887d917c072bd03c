"""The number of threads that torch has, which belongs to each thread and to the process."""

import threading

import torch

_THREADS = threading.Lock()


def thread_count() -> int:
    """How many threads torch has in the calling thread."""
    # Torch looks up the number of the process when a thread first asks: not while it is changed.
    with _THREADS:
        return torch.get_num_threads()


def give_one_thread(others: int) -> None:
    """Leave torch one thread in the calling, new thread; others made later have so many.

    Torch hands the last number set in any thread on to all threads that are made afterwards. What
    this one got may be the number that some other thread has set for a while.
    """
    with _THREADS:
        torch.get_num_threads()  # a thread's first call takes over the number of the process
        torch.set_num_threads(1)
        restore = threading.Thread(target=torch.set_num_threads, args=(others,))
        restore.start()
        restore.join()
