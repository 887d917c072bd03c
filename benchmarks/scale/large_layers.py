"""svd of one large Linear, by its weights and by the moments of its inputs, on one thread.

What is held against the bound is the time for which the thread had the processor: another program
that wants it as well makes no fit slower. Memory is the most that the process held over what it
held with the layer (and the moments) made, as a multiple of the layer's float32 weights.
"""

import argparse
import time

import torch
from torch import nn

import tdecomp
from benchmarks.scale.row import ScaleRow
from benchmarks.support.fresh_process import in_fresh_process, in_this_process
from benchmarks.support.private_memory import PrivatePeak
from tdecomp.runtime.parallel import OneThread

_SIDES, _RANK, _ROWS = (4096, 11008), 1024, 5000
_QUICK_SIDES, _QUICK_RANK, _QUICK_ROWS = (64, 96), 8, 200
# Seconds, and multiples of the weights.
_BY_WEIGHTS, _BY_MOMENTS = (15.0, 3.0), (35.0, 5.0)


def run(options: argparse.Namespace) -> list[ScaleRow]:
    """Two layers, each by weights and by moments."""
    measure = in_this_process if options.quick else in_fresh_process
    narrow, wide = _QUICK_SIDES if options.quick else _SIDES
    rank = _QUICK_RANK if options.quick else _RANK
    rows = _QUICK_ROWS if options.quick else _ROWS
    found = []
    for into, out in ((narrow, wide), (wide, narrow)):
        for seen, bound in ((0, _BY_WEIGHTS), (rows, _BY_MOMENTS)):
            calibrating, passed, seconds, multiple = measure(fit, into, out, rank, seen)
            by = f"moments of {seen:,} rows" if seen else "weights"
            measured = (
                f"{seconds:.1f} s ({passed:.1f} by the clock), {multiple:.1f} times the weights"
            )
            found.append(ScaleRow(
                f"svd of a Linear {into}→{out} at rank {rank}, by {by}",
                f"{bound[0]:.0f} s, {bound[1]:.0f} times",
                measured + (f"; calibrating before it {calibrating:.1f} s" if seen else ""),
                seconds <= bound[0] and multiple <= bound[1],
            ))  # fmt: skip
    return found


def fit(into: int, out: int, rank: int, rows: int) -> tuple[float, float, float, float]:
    """Seconds of calibrating; of decomposing by the clock and of the processor, and its memory."""
    with OneThread():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(into, out, bias=False))
        data, calibrating = None, 0.0
        if rows:
            inputs = torch.randn(rows, into) * torch.linspace(0.1, 3.0, into)
            batches = tdecomp.Data(list(inputs.split(500)), held_out=0)
            began = time.thread_time()
            data = tdecomp.calibrate(model, batches, gradients=False, progress=False)
            calibrating = time.thread_time() - began
            del inputs, batches
        with PrivatePeak() as watched:
            tdecomp.decompose(model, "svd", rank=rank, data=data, inplace=True, progress=False)
    return calibrating, watched.seconds, watched.processor, watched.extra / (4 * into * out)
