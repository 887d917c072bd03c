"""The memory that is free where a model is."""

import os
from pathlib import Path

import torch


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
