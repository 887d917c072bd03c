"""What a stream takes of a checkpoint of 1.1 billion parameters: memory, and time beside a loop.

    python -m benchmarks.scale streaming

Memory is what a process, with those that it starts, shares with no other (Private_* of Linux), over
what it is once torch is imported. The plain loop goes over the same matrices, read and written.
Seconds are of the processor, which other work on the machine disturbs less.
"""

import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from benchmarks.scale.checkpoint import TINY, LlamaSizes, make_llama
from benchmarks.scale.row import ScaleRow
from benchmarks.support.private_memory import PrivatePeak

_MEMORY, _TIME = 0.8e9, 1.25
_EVERY = 0.1  # seconds between two looks at the memory


@dataclass(frozen=True)
class Taken:
    """What a process took."""

    memory: int  # bytes, over the interpreter with torch
    seconds: float  # of the processor
    wall: float


def run(options: Namespace) -> list[ScaleRow]:
    """The rows of the table."""
    sizes = TINY if options.quick else LlamaSizes()
    source = make_llama(options.folder / "llama", sizes)
    streamed = taken("stream", source, options.folder / "streamed")
    looped = taken("loop", source, options.folder / "looped")
    ratio = streamed.seconds / looped.seconds
    what = f"stream, a Llama of {_parameters(source)}, svd at 0.6 of the parameters"
    seconds = f"{streamed.seconds:.0f} s against {looped.seconds:.0f} s"
    wall = f"{streamed.wall:.0f} s against {looped.wall:.0f} s by the clock"
    return [
        ScaleRow(
            f"{what}: private memory", f"{_MEMORY / 1e9} GB", f"{streamed.memory / 1e9:.2f} GB",
            streamed.memory <= _MEMORY,
        ),
        ScaleRow(
            "its time, against a plain loop of torch.linalg.svd", f"{_TIME} times",
            f"{ratio:.2f} times ({seconds}; {wall})", ratio <= _TIME,
        ),
    ]  # fmt: skip


def taken(how: str, source: Path, target: Path) -> Taken:
    """What a process of its own takes to stream, or to loop."""
    paths = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "benchmarks.scale.streamed", how, str(source), str(target)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": paths},
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        with PrivatePeak(process.pid, _EVERY) as watched:
            process.stdin.write("\n")
            process.stdin.flush()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{how} of {source} failed with exit status {process.returncode}")
    return Taken(watched.extra, used.ru_utime + used.ru_stime, watched.seconds)


def _parameters(source: Path) -> str:
    from tdecomp.layers.cost import count_in_words
    from tdecomp.streaming.source import open_source

    stored = open_source(source).tensors.values()
    return f"{count_in_words(sum(one.numel for one in stored))} parameters"
