"""The memory that is free where a model is."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

# Of mallopt: the bytes from which on a block has pages of its own, and that are kept when freed.
_OWN_PAGES, _KEPT = -3, -1


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where this cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu":
        linux = Path("/proc/meminfo")  # which counts what files are cached in as free
        if linux.exists():
            lines = dict(line.split(":") for line in linux.read_text().splitlines())
            if "MemAvailable" in lines:
                return 1024 * int(lines["MemAvailable"].split()[0])
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):  # not every system tells
            return None
    return None


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Inside, what is freed goes back to the system, where glibc keeps some for each thread.

    It makes large tensors slower. Afterwards the thresholds are those that glibc arrives at by
    itself where blocks of 32 MiB and more are freed.
    """
    _glibc("malloc_trim", 0)
    _glibc("mallopt", _OWN_PAGES, 2**20)
    try:
        yield
    finally:
        _glibc("mallopt", _OWN_PAGES, 2**25)
        _glibc("mallopt", _KEPT, 2**26)


def _glibc(function: str, *arguments: int) -> None:
    with suppress(AttributeError, OSError, TypeError):  # other systems have no such function
        getattr(ctypes.CDLL(None), function)(*arguments)
