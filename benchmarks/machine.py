"""What a measurement was made on."""

import os
import platform
from importlib.metadata import version

import torch

from tdecomp.latency.setting import processor_name


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
    packages = ("tdecomp", "torch", "tensorly", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
