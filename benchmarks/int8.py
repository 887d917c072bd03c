"""Int8 weights against factors, and both together, at equal bytes.

A ResNet-20 on images, if its weights and data are given, and the small transformer on docstrings
that ships with the benchmarks. Weights in whole numbers have a scale for each output: in the
ResNet they are rounded by torch's own observers and fake quantization, also in the Linear layer; in
the transformer the int8 ones are torchao's (`Int8WeightOnlyConfig`), on its Linear layers. Factors
are fitted to unlabelled data under a budget of parameters, then refitted, before anything is
rounded. Factors alone are given the bytes that whole numbers take, so that rows between two lines
are equal in size. Bytes are of all parameters and buffers.

    python -m benchmarks.int8 --weights FILE --data FOLDER
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import SEPARATING_LINE, tabulate
from torch import nn

import tdecomp
from benchmarks.support.data import image_folder
from benchmarks.support.int8 import int8_by_torchao, rounded, stored_bytes
from benchmarks.support.machine import describe_machine, describe_versions
from benchmarks.support.models import input_format, load_model
from benchmarks.support.output_error import lost_share
from benchmarks.support.text import counted, docstrings
from benchmarks.support.transformer import nats, outputs, trained_transformer

NETWORK = "resnet20"
# The parameters that are left before weights are rounded to int8.
SHARES = (0.5, 0.25)
_BATCH = 128
RECOVERIES: dict[str, Callable[..., tdecomp.Recovery]] = {
    "refit": tdecomp.refit,
    "reconstruct": tdecomp.reconstruct,
    "distill": tdecomp.distill,
}


@dataclass(frozen=True)
class Subject:
    """A trained network, what factors are fitted to, and how it is judged."""

    name: str
    model: nn.Module
    methods: str
    data: tdecomp.Data
    measure: str
    style: str  # of its numbers
    judge: Callable[[nn.Module], tuple[float, float]]  # the measure, and the outputs' lost share
    int8: Callable[[nn.Module], tuple[nn.Module, int]]


@dataclass(frozen=True)
class Result:
    """A line of the table."""

    weights: str
    size: int
    measure: float
    lost: float
    block: int = 0  # rows of one block are equal in size


def images(weights: str, folder: Path, unlabelled: int, seed: int) -> Subject:
    """ResNet-20 on a folder of images, judged by its accuracy."""
    model = load_model(NETWORK, weights)
    data = image_folder(folder, input_format(NETWORK), train_images=unlabelled, seed=seed)
    batches = [x for x, _ in data.train.in_order(_BATCH)]

    @torch.inference_mode()
    def logits(network: nn.Module) -> torch.Tensor:
        return torch.cat([network(x) for x, _ in data.val.in_order(_BATCH)]).double()

    wanted = logits(model)

    def judge(network: nn.Module) -> tuple[float, float]:
        found = logits(network)
        right = (found.argmax(dim=1) == data.val.labels).double().mean()
        return 100 * float(right), lost_share(wanted, found)

    name = f"{NETWORK}, {data.title}"
    given = tdecomp.Data(batches)
    return Subject(name, model, "auto", given, "accuracy", ".2f", judge, lambda m: rounded(m, 8))


def text(pieces: int, val_pieces: int | None, seed: int) -> Subject:
    """The transformer as a language model, judged by its loss on held-out files."""
    model, texts = trained_transformer(), docstrings()
    order = torch.randperm(len(texts.train), generator=torch.Generator().manual_seed(seed))
    drawn = texts.train[order[:pieces]]
    data = tdecomp.Data(list(drawn.split(32)), mask=counted, augment=None)
    draw = torch.randperm(len(texts.val), generator=torch.Generator().manual_seed(0))
    val = texts.val[draw[:val_pieces]]
    counts = counted(val)
    wanted = outputs(model, val)[counts].double()

    def judge(network: nn.Module) -> tuple[float, float]:
        found = outputs(network, val)
        return nats(found, val).item(), lost_share(wanted, found[counts].double())

    def int8(network: nn.Module) -> tuple[nn.Module, int]:
        twin = int8_by_torchao(network)
        return twin, stored_bytes(twin)

    return Subject(
        "transformer, docstrings", model, "svd", data, "loss in nats", ".4f", judge, int8
    )


def measure(subject: Subject, shares: Sequence[float], recover: Sequence[str]) -> list[Result]:
    """The original, then a block for int8 alone and one for each share of the parameters."""
    whole = stored_bytes(subject.model)
    results = []

    def add(block: int, words: str, network: nn.Module, size: int | None = None) -> int:
        size = stored_bytes(network) if size is None else size
        results.append(Result(words, size, *subject.judge(network), block))
        print(subject.name, results[-1], flush=True)
        return size

    quiet: dict[str, Any] = {"progress": False}
    moments = tdecomp.calibrate(subject.model, subject.data, **quiet)

    def factors(share: float) -> nn.Module:
        budget, example = tdecomp.Budget(params=share), subject.data.batches[0][:1]
        plan = tdecomp.plan(
            subject.model, subject.methods, rank=budget, example_inputs=example, data=moments,
            **quiet,
        )  # fmt: skip
        network = tdecomp.apply(subject.model, plan, data=moments, **quiet).model
        for step in recover:
            network = RECOVERIES[step](network, subject.model, subject.data, **quiet).model
        return network

    add(0, "float32", subject.model)
    size = add(1, "int8", *subject.int8(subject.model))
    add(1, f"factors with {size / whole:.3f} of the parameters", factors(size / whole))
    for block, share in enumerate(shares, start=2):
        small, words = factors(share), f"factors with {share:g} of the parameters"
        size = add(block, f"{words}, int8", *subject.int8(small))
        if block == 2:  # the same bytes, but for the scales
            add(block, "int4", *rounded(subject.model, 4))
        try:
            alone = factors(size / whole)
        except ValueError as error:
            print(f"{subject.name} at {size / whole:.3f} of the parameters left out: {error}")
            continue
        add(block, f"factors with {size / whole:.3f} of the parameters", alone)
    return results


def table(subject: Subject, results: Sequence[Result]) -> str:
    """Bytes, what is measured and the lost share of the outputs, a line between the blocks."""
    rows: list[Any] = []
    whole = results[0].size
    for before, result in zip((None, *results), results, strict=False):
        if before is not None and before.block != result.block:
            rows.append(SEPARATING_LINE)
        rows.append(
            [
                result.weights,
                f"{result.size:,}",
                f"{result.size / whole:.3f}",
                format(result.measure, subject.style),
                f"{result.lost:.4f}",
            ]
        )
    headers = [f"{subject.name}:\nweights", "bytes", "of float32's", subject.measure, "lost share"]
    alignment = ("left", *["right"] * 4)
    return tabulate(rows, headers=headers, colalign=alignment, disable_numparse=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m benchmarks.int8` with these command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.int8",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--weights", metavar="FILE", help="of a ResNet-20; left out, only the text")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="FOLDER/train and FOLDER/val")
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="before rounding")
    parser.add_argument("--recover", nargs="*", choices=tuple(RECOVERIES), default=["refit"])
    parser.add_argument("--images", type=int, default=1024, help="unlabelled (default: 1024)")
    parser.add_argument("--pieces", type=int, default=512, help="of text (default: 512)")
    parser.add_argument("--val-pieces", type=int, help="of text to judge by (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="draws images and pieces")
    options = parser.parse_args(arguments)
    if (options.weights is None) != (options.data is None):
        parser.error("expected --weights and --data together, or neither")
    try:
        subjects = [text(options.pieces, options.val_pieces, options.seed)]
        if options.weights is not None:
            subjects.insert(0, images(options.weights, options.data, options.images, options.seed))
    except ValueError as error:
        parser.error(str(error))
    tables = [table(one, measure(one, options.shares, options.recover)) for one in subjects]
    machine = describe_machine()
    print("\n", "\n\n".join(tables), "\n", sep="")
    print(
        f"* factors: {', '.join(options.recover) or 'without recovery'}; seed {options.seed}, "
        f"{options.images} unlabelled images, {options.pieces} pieces of text"
    )
    print("* lost share: of the variance of the outputs on the data that it is judged by")
    print(f"* {machine['torch_threads']} threads of {machine['cpu']}; {describe_versions()}")


if __name__ == "__main__":
    main()
