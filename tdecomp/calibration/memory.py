"""The memory that is free where a model is."""

import os

import torch


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where this cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu":
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):  # not every system tells
            return None
    return None
