"""The machine and the mode that a model runs in: measured times hold for these only."""

import os
import platform
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn


@dataclass(frozen=True)
class Setting:
    """The machine and the mode that times were taken in."""

    machine: str  # the processor, or the GPU
    device: str  # that of most of the model's parameters, as is the dtype
    dtype: str
    threads: int  # how many torch uses within an operation
    compiled: bool  # whether the whole model runs compiled, by torch.compile
    torch: str  # its version

    @classmethod
    def of(cls, model: nn.Module, *, compiled: bool = False) -> "Setting":
        """The setting in which this model would run now."""
        device, dtype = device_and_dtype(model)
        on_gpu = device.type == "cuda"
        processor = f"{processor_name()}, {os.cpu_count()} cores"
        machine = torch.cuda.get_device_name(device) if on_gpu else processor
        dtype_name, threads = str(dtype).removeprefix("torch."), torch.get_num_threads()
        return cls(machine, device.type, dtype_name, threads, compiled, torch.__version__)

    def differences(self, now: "Setting") -> list[str]:
        """Both values, in words, of each field that has changed."""
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


def processor_name() -> str:
    """The processor's name, as its maker gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
