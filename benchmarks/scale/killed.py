"""Whether a stream that is killed at any moment goes on to the same bytes.

    python -m benchmarks.scale killed

Each time a process that streams a small checkpoint is killed (SIGKILL) after a random part of the
time that it takes, and the same call is made again. All files then have to be those of a stream
that nobody disturbed.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch

import tdecomp
from benchmarks.scale.checkpoint import LlamaSizes, make_llama
from benchmarks.scale.row import ScaleRow
from benchmarks.support.fresh_process import in_fresh_process

SMALL = LlamaSizes(256, 64, 96, 4, 4, 2, 4)
_TIMES, _QUICK = 20, 3


@dataclass(frozen=True)
class Killed:
    """What became of the streams that were to be killed."""

    killed: int  # the others had ended before
    identical: int


def run(options: Namespace) -> list[ScaleRow]:
    """The row of the table."""
    times = _QUICK if options.quick else _TIMES
    found = in_fresh_process(kill_and_resume, options.folder / "killed", times)
    measured = f"{found.identical} of {times} identical, {found.killed} killed before their end"
    what = f"SIGKILL at {times} random moments, resumed"
    return [ScaleRow(what, "byte-identical", measured, found.identical == times)]


def kill_and_resume(folder: Path, times: int, seed: int = 0) -> Killed:
    """Kill so many streams at random moments and resume them; needs a process without threads."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    source, target = small_checkpoint(folder / "source"), folder / "target"
    _stream(source, target)
    shutil.rmtree(target)
    began = time.perf_counter()  # from here on nothing is done for the first time
    _stream(source, target)
    seconds, whole = time.perf_counter() - began, digests(target)
    killed = identical = 0
    for _ in range(times):
        shutil.rmtree(target)
        child = os.fork()
        if not child:
            try:
                _stream(source, target)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0.0, seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        _stream(source, target)
        identical += digests(target) == whole
    return Killed(killed, identical)


def small_checkpoint(folder: Path) -> Path:
    """A small Llama of a maker that no library knows, so that none is imported to look at it."""
    make_llama(folder, SMALL)
    (folder / "config.json").write_text(json.dumps({"model_type": "a maker's own"}))
    return folder


def _stream(source: Path, target: Path) -> None:
    tdecomp.stream(
        source, target, "svd", rank=tdecomp.Budget(params=0.6), include="model.layers",
        progress=False,
    )  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    """By its name a hash of each file in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
