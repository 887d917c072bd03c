"""What calibrating takes in plain passes over the same batches, on one thread.

Times are those for which the process had the processor, which no other program makes longer.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import tdecomp
from benchmarks.scale.row import ScaleRow
from benchmarks.support.fresh_process import in_fresh_process, in_this_process
from benchmarks.support.torchvision_import import import_torchvision
from tdecomp.runtime.parallel import OneThread

_BOUND = 3.0
_WIDTH, _BLOCKS, _BATCHES, _SENTENCES, _LENGTH = 384, 6, 16, 32, 128
_QUICK = (16, 2, 3, 2, 8)


def run(options: argparse.Namespace) -> list[ScaleRow]:
    """One row without gradients, and one that says what these add."""
    measure = in_this_process if options.quick else in_fresh_process
    sizes = _QUICK if options.quick else (_WIDTH, _BLOCKS, _BATCHES, _SENTENCES, _LENGTH)
    width, blocks, batches, sentences, length = sizes
    plain, without, added = measure(calibrated, sizes)
    what = f"calibrating a BERT of {blocks} blocks of {width}, {batches} batches of {sentences} "
    what += f"sentences of {length} tokens"
    return [
        ScaleRow(
            f"{what}, gradients=False", f"{_BOUND:.0f} plain passes",
            f"{without:.2f} plain passes (one takes {plain:.1f} s of the processor)",
            without <= _BOUND,
        ),
        ScaleRow("gradients, of at most 128 of the sentences", "–", f"{added:.2f} more"),
    ]  # fmt: skip


def calibrated(sizes: tuple[int, ...]) -> tuple[float, float, float]:
    """Seconds of a plain pass; calibrating without gradients and what they add, in such passes."""
    torch.manual_seed(0)
    width, blocks, batches, sentences, length = sizes
    model = bert(width, blocks)
    tokens = [torch.randint(1000, (sentences, length)) for _ in range(batches)]

    @torch.inference_mode()
    def plain() -> None:
        for batch in tokens:
            model(batch)

    def moments(gradients: bool) -> tdecomp.Moments:
        return tdecomp.calibrate(model, tokens, gradients=gradients, progress=False)

    with OneThread():
        model(tokens[0])
        seconds = [_seconds(plain)]  # before and after: what else runs meets all alike
        without = _seconds(lambda: moments(gradients=False))
        seconds.append(_seconds(plain))
        complete = _seconds(lambda: moments(gradients=True))
        seconds.append(_seconds(plain))
    passes = without / (sum(seconds[:2]) / 2), complete / (sum(seconds[1:]) / 2)
    return min(seconds), passes[0], passes[1] - passes[0]


def bert(width: int, blocks: int) -> nn.Module:
    """transformers' encoder of these sizes, with random weights."""
    import_torchvision()
    from transformers import BertConfig, BertModel  # after torchvision, which it looks for

    config = BertConfig(
        vocab_size=1000, hidden_size=width, num_hidden_layers=blocks, num_attention_heads=4,
        intermediate_size=4 * width,
    )  # fmt: skip
    model: nn.Module = BertModel(config, add_pooling_layer=False)
    return model.eval()


def _seconds(run: Callable[[], Any]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began
