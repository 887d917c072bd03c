"""Whether batch norm had better be folded into the convolutions before they are decomposed.

Accuracy on the validation images of a network decomposed as it was trained, its batch norms folded
afterwards, and of the same network decomposed with its batch norms folded first; fitted to the
weights alone, and to unlabelled images.

    python -m benchmarks.fuse_first --data FOLDER --weights resnet20=FILE
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import tdecomp
from benchmarks.support.data import Dataset, image_folder
from benchmarks.support.machine import describe_versions
from benchmarks.support.models import input_format, load_model

BATCH_SIZE = 128
LINES: tuple[tuple[str, float, bool], ...] = (
    ("dense", 0.9, False),
    ("dense", 0.75, False),
    ("dense", 0.5, False),
    ("dense", 0.5, True),
    ("dense", 0.3, True),
)


@torch.inference_mode()
def accuracy(model: nn.Module, data: Dataset) -> float:
    """In percent, on all validation images."""
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in data.val.in_order(BATCH_SIZE))
    return 100 * right / len(data.val)


def decomposed(model: nn.Module, method: str, macs: float, batches: list[Tensor] | None) -> Any:
    """The model at a share of its MACs, its batch norms folded."""
    augment = None if batches is None else tdecomp.flip_and_shift
    data = None if batches is None else tdecomp.Data(batches, augment=augment)
    example = torch.zeros(1, 3, 32, 32)
    result = tdecomp.decompose(
        model, method, rank=tdecomp.Budget(macs=macs), example_inputs=example, data=data,
        progress=False,
    )  # fmt: skip
    return tdecomp.fuse_batchnorm(result.model)


def rows(model: nn.Module, data: Dataset) -> list[list[str]]:
    """One for each line: what was asked for, and the accuracies."""
    first = tdecomp.fuse_batchnorm(model)
    batches = [x for x, _ in data.train.in_order(BATCH_SIZE)]
    found = []
    for method, macs, with_data in LINES:
        given = batches if with_data else None
        right = [accuracy(decomposed(m, method, macs, given), data) for m in (model, first)]
        fitted = f"{sum(map(len, batches))} images" if with_data else "weights"
        found.append([method, f"{macs:.2f}", fitted, *(f"{value:.2f}" for value in right)])
        print(*found[-1], flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m benchmarks.fuse_first` with these command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuse_first",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER", help="FOLDER/train and FOLDER/val"
    )
    parser.add_argument("--weights", required=True, metavar="NETWORK=FILE")
    parser.add_argument("--images", type=int, default=1024, help="unlabelled (default: 1024)")
    options = parser.parse_args(arguments)
    name, _, file = options.weights.partition("=")
    try:
        data = image_folder(options.data, input_format(name), train_images=options.images, seed=0)
        model = load_model(name, file)
    except ValueError as error:
        parser.error(str(error))
    print(f"{name} on {data.title}: {accuracy(model, data):.2f} % of {len(data.val)} images")
    headers = ["methods", "MACs", "fitted to", "as trained", "folded first"]
    print(f"\n{tabulate(rows(model, data), headers=headers, disable_numparse=True)}\n")
    print(f"* accuracy in percent, batch norm folded in both; {describe_versions()}")


if __name__ == "__main__":
    main()
