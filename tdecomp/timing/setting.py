"""The machine and the mode that a model runs in, for which alone measured times hold."""

import os
import platform
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn


@dataclass(frozen=True)
class Setting:
    """The machine and the mode that times were taken on.

    Attributes
    ----------
    machine : str
        The processor, or the GPU.
    device, dtype : str
        Those of most of the model's parameters.
    threads : int
        How many torch uses within an operation.
    compiled : bool
        Whether the whole model runs compiled, by ``torch.compile``.
    torch : str
        Its version.
    """

    machine: str
    device: str
    dtype: str
    threads: int
    compiled: bool
    torch: str

    @classmethod
    def of(cls, model: nn.Module, *, compiled: bool = False) -> "Setting":
        """The setting in which this model would run now."""
        device, dtype = device_and_dtype(model)
        machine = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
        return cls(
            machine,
            device.type,
            str(dtype).removeprefix("torch."),
            torch.get_num_threads(),
            compiled,
            torch.__version__,
        )

    def differences(self, now: "Setting") -> list[str]:
        """For each field whose value is another now, both values in words."""
        pairs = ((f.name, getattr(self, f.name), getattr(now, f.name)) for f in fields(self))
        return [f"{name} {then!r}, now {here!r}" for name, then, here in pairs if then != here]

    def __str__(self) -> str:
        how = "compiled" if self.compiled else "eager"
        return f"{self.machine}, {self.dtype}, {self.threads} threads, {how}, torch {self.torch}"


def device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype of most of a model's parameters."""
    kinds = Counter[tuple[torch.device, torch.dtype]]()
    for parameter in model.parameters():
        kinds[parameter.device, parameter.dtype] += parameter.numel()
    return max(kinds, key=lambda kind: kinds[kind])


def processor() -> str:
    """The processor's name and its number of cores."""
    return f"{processor_name()}, {os.cpu_count()} cores"


def processor_name() -> str:
    """The name that its maker gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
