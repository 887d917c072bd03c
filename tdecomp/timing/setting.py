"""Where and how a model is run: what a measured time is only good for."""

import os
import platform
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# The layouts of images and kernels that torch knows, by name.
LAYOUTS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


@dataclass(frozen=True)
class Setting:
    """The machine and the mode that times were taken on.

    Attributes
    ----------
    machine : str
        The processor, or the GPU.
    device, dtype : str
        Of most of the model's parameters.
    threads : int
        Of torch, within an operation.
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
        """In words, what is another now."""
        pairs = ((f.name, getattr(self, f.name), getattr(now, f.name)) for f in fields(self))
        return [f"{name} {then!r}, now {here!r}" for name, then, here in pairs if then != here]

    def __str__(self) -> str:
        how = "compiled" if self.compiled else "eager"
        return f"{self.machine}, {self.dtype}, {self.threads} threads, {how}, torch {self.torch}"


def device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Those of most of a model's parameters."""
    kinds = Counter[tuple[torch.device, torch.dtype]]()
    for parameter in model.parameters():
        kinds[parameter.device, parameter.dtype] += parameter.numel()
    return max(kinds, key=lambda kind: kinds[kind])


def processor() -> str:
    """The processor's name and its number of cores."""
    return f"{processor_name()}, {os.cpu_count()} cores"


def processor_name() -> str:
    """As its maker calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def layout_of(model: nn.Module) -> str:
    """The layout that most of the model's kernels are stored in."""
    kernels = [p for p in model.parameters() if p.dim() == 4 and not p.is_contiguous()]
    last = [p for p in kernels if p.is_contiguous(memory_format=torch.channels_last)]
    ambiguous = (p for p in model.parameters() if p.dim() == 4 and p.is_contiguous())
    plain = sum(not p.is_contiguous(memory_format=torch.channels_last) for p in ambiguous)
    return "channels_last" if len(last) > plain else "contiguous"


def in_layout(value: Any, layout: str) -> Any:
    """A module (itself, changed) or inputs (copies where needed) with all images in this layout."""
    memory_format = LAYOUTS[layout]
    if isinstance(value, nn.Module):
        return value.to(memory_format=memory_format)  # type: ignore[call-overload]
    if isinstance(value, Tensor):
        return value.contiguous(memory_format=memory_format) if value.dim() == 4 else value
    if isinstance(value, dict):
        return {key: in_layout(item, layout) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(in_layout(item, layout) for item in value)
    return value
