"""What a measurement was made on."""

import os
import platform
import resource
from importlib.metadata import version
from pathlib import Path

import torch

import tdecomp
from tdecomp.timing.stopwatch import processor_name


def describe_machine() -> dict[str, str | int]:
    """The processor, and how much of it torch uses."""
    return {
        "cpu": processor_name(),
        "cores": os.cpu_count() or 1,
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_versions() -> dict[str, str]:
    """The versions a measurement depends on."""
    own = {"python": platform.python_version(), "tdecomp": tdecomp.__version__}
    return own | {name: version(name) for name in ("torch", "tensorly", "numpy")}


def peak_memory() -> int:
    """The most bytes that this process held at once.

    Not `ru_maxrss` where there is another way: that starts from what the parent process held.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
