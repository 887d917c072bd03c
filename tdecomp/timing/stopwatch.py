"""This machine, and seconds of layers, chains and models on it, interleaved against noise."""

import os
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.benchmark import Timer

from tdecomp.layers.geometry import Call
from tdecomp.layers.spec import LayerSpec
from tdecomp.layers.stage import Stage
from tdecomp.model.example import Example, images_in_layout, in_layout, layout_of
from tdecomp.model.surgery import copy_with
from tdecomp.runtime.progress import Progress
from tdecomp.runtime.torch_state import evaluating
from tdecomp.timing.speed import Quartiles

# A layer, or the chain that may replace it.
Stages = tuple[Stage, ...]

# Rounds in which whole models are timed, for how many seconds in each.
MODEL_ROUNDS = 9
_MODEL_BLOCK = 0.02
# One trial that something else disturbs would leave a block with too few calls.
_TRIALS = 3


@dataclass(frozen=True)
class TimingEffort:
    """How much time is spent on measuring."""

    points: int  # how many ranks of each method are timed
    rounds: int
    min_block: float  # the seconds that each chain is called for in a round


EFFORTS = {
    "quick": TimingEffort(3, 3, 0.001),
    "default": TimingEffort(5, 7, 0.003),
    "thorough": TimingEffort(9, 15, 0.01),
}


class Stopwatch:
    """Measures on this machine; one whose times follow a known law can take its place."""

    def layers(
        self,
        chains: Sequence[Stages],
        call: Call,
        layout: str,
        device: torch.device,
        dtype: torch.dtype,
        effort: TimingEffort,
    ) -> NDArray[np.float64]:
        """Seconds (rounds, chains) of one call of a layer and of chains that may replace it."""
        x = _input(chains[0][0], call, device, dtype)
        x = images_in_layout(x, layout)
        calls = [partial(_built(stages, layout, device, dtype), x) for stages in chains]
        with torch.inference_mode():
            return interleaved(calls, rounds=effort.rounds, min_block=effort.min_block)

    def layers_in(self, model: nn.Module, effort: TimingEffort) -> Callable[..., Any]:
        """`layers` on the device and in the dtype of a model."""
        device, dtype = device_and_dtype(model)
        return partial(self.layers, device=device, dtype=dtype, effort=effort)

    def models(
        self,
        runs: Sequence[tuple[nn.Module, str]],
        example: Example,
        *,
        compiled: bool = False,
        rounds: int = MODEL_ROUNDS,
    ) -> NDArray[np.float64]:
        """Seconds (rounds, runs) of one pass of each model in its layout; none is changed."""
        with evaluating(*(model for model, _ in runs)):
            if compiled:
                # torch compiles the same code a limited number of times; from then on it silently
                # runs models uncompiled.
                torch.compiler.reset()
            calls = [_call(model, layout, example, compiled) for model, layout in runs]
            with torch.inference_mode():
                return interleaved(calls, rounds=rounds, min_block=_MODEL_BLOCK)


THIS_MACHINE = Stopwatch()


def interleaved(
    functions: Sequence[Callable[[], Any]],
    *,
    rounds: int,
    min_block: float,
    progress: str | None = None,
) -> NDArray[np.float64]:
    """Seconds (rounds, functions) of one call of each, on torch's current number of threads.

    In every round each function is called for about `min_block` seconds; every other round runs
    in reverse order, so that no function always follows the same one. `progress` titles a bar.
    """
    threads = torch.get_num_threads()
    # torch's own timer waits for GPUs, holds off the garbage collector and warms up.
    timers = [Timer("f()", globals={"f": f}, num_threads=threads) for f in functions]
    repeats = [max(1, round(min_block / _one_call(timer, min_block))) for timer in timers]
    seconds, order = np.empty((rounds, len(timers))), range(len(timers))
    bar = Progress(progress is not None)
    for i in bar.over(range(rounds), progress or "", rounds, "rounds"):
        for j in order if i % 2 == 0 else reversed(order):
            seconds[i, j] = _timed(timers[j], repeats[j])
    return seconds


def _one_call(timer: Timer, min_block: float) -> float:
    """Seconds of one call: the least of three, or of fewer where they take long."""
    trials = [_timed(timer, 1)]
    while len(trials) < _TRIALS and sum(trials) < _TRIALS * min_block:
        trials.append(_timed(timer, 1))
    return min(trials)


def _timed(timer: Timer, repeats: int) -> float:
    # `times` holds one number; `mean` would be computed on the default device, which may be meta.
    return float(timer.timeit(repeats).times[0])


def ratio(seconds: NDArray[np.float64], of: int, to: int) -> Quartiles:
    """The ratio of two columns, taken within each round."""
    return Quartiles.over(seconds[:, of] / seconds[:, to])


def random_weights(module: nn.Module) -> nn.Module:
    """Fill a module's weights; its outputs are then about as large as its inputs.

    Tiny outputs would become denormal numbers, on which arithmetic is slow.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 1
            values = torch.randn(parameter.shape, generator=generator, device="cpu")
            parameter.copy_(values / fan_in**0.5)
    return module.requires_grad_(False).eval()


def _input(stage: Stage, call: Call, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """What such a call gets: ones, or the numbers of a lookup's rows."""
    channels = stage.in_channels
    if isinstance(stage, LayerSpec) and not stage.ndim and not stage.lookup:
        channels = stage.group_in  # a row of several Linears in one has the inputs of its own
    if isinstance(stage, LayerSpec) and stage.lookup:
        rows = torch.arange(call.batch, device=device) % channels
        return rows[:, None] if stage.kind == "EmbeddingBag" else rows
    return torch.ones(call.batch, channels, *call.size, device=device, dtype=dtype)


def _built(stages: Stages, layout: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    layers = [stage.build(device, dtype) for stage in stages]
    module: nn.Module = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
    return in_layout(random_weights(module), layout)


def _call(model: nn.Module, layout: str, example: Example, compiled: bool) -> Callable[[], Any]:
    ready = model if layout == layout_of(model) else in_layout(copy_with(model, {}), layout)
    example = example.copied().in_layout(layout)
    if compiled and example.forward is not None:
        # It may call only a part of the model, which compiling the model would leave uncompiled.
        example = replace(example, forward=torch.compile(example.forward))
    elif compiled:
        ready = torch.compile(ready)  # type: ignore[assignment]
    return partial(example.run, ready)


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
    def of(cls, model: nn.Module, compiled: bool = False) -> "Setting":
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
