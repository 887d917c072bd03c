"""What each method loses on each kind of layer, at equal shares of the layer's MACs.

The shares of a layer's output variance that are lost, on samples that are held out, by fits to
unlabelled inputs: the table of `tdecomp.sensitivity`, for each method alone, as the median over the
layers of a kind. Of the two trained networks that ship with the repository, or of others:

    python -m benchmarks.layer_kinds
    python -m benchmarks.layer_kinds --data FOLDER --weights resnet20=FILE vgg11_bn=FILE
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import tdecomp
from benchmarks.support.data import digits, image_folder
from benchmarks.support.models import input_format, load_model
from benchmarks.support.text import counted, docstrings
from benchmarks.support.transformer import trained_transformer

SHARES = (0.5, 0.25, 0.1)
METHODS = ("svd", "lowrank", "spatial", "tucker2", "cp", "cp-separable")
_WIDTHS = (16, 64, 128)
_BATCH = 64


def kind_in_words(spec: tdecomp.LayerSpec) -> str:
    """The kernel of a layer, and how wide its narrower side is."""
    if not spec.ndim:
        return "Linear"
    narrow, kernel = min(spec.in_channels, spec.out_channels), "×".join(map(str, spec.kernel_size))
    if narrow < _WIDTHS[0]:
        return f"{kernel}, first layer" if spec.in_channels == narrow else f"{kernel}, narrow"
    least = max(width for width in _WIDTHS if width <= narrow)
    most = next((f"to {width - 1}" for width in _WIDTHS if width > narrow), "and more")
    return f"{kernel}, {least} {most} channels"


def rows_of(name: str, model: nn.Module, data: tdecomp.Data) -> Iterator[list[str]]:
    """One row for each kind of layer and each method that can take it."""
    example = data.batches[0][:1]
    moments = tdecomp.calibrate(model, data, progress=False)
    errors: dict[tuple[str, str], list[list[float | None]]] = defaultdict(list)
    for method in METHODS:
        # Beside others a method is not fitted where another one is sure to lose less.
        table = tdecomp.sensitivity(
            model, method, example_inputs=example, data=moments, progress=False
        )
        for layer in table.values():
            if layer and layer.layer is not None:
                lost = [_lost(layer, method, share) for share in SHARES]
                errors[kind_in_words(layer.layer), method].append(lost)
    for (kind, method), several in sorted(errors.items(), key=lambda item: item[0][0]):
        cells = map(_median, zip(*several, strict=True))
        yield [name, kind, str(len(several)), method, *cells]


def _lost(layer: Any, method: str, share: float) -> float | None:
    """What the largest rank loses that keeps at most this share of the layer's cost."""
    within = [p for p in layer[method].points if p.cost.amount <= share * layer.before.amount]
    return within[-1].error if within else None


def _median(errors: Sequence[float | None]) -> str:
    """Empty unless the method can take every layer of the kind so small."""
    known = [error for error in errors if error is not None]
    return f"{median(known):.3f}" if known and len(known) == len(errors) else ""


def networks(options: argparse.Namespace) -> Iterator[tuple[str, nn.Module, tdecomp.Data]]:
    """Trained networks, with unlabelled inputs of theirs."""
    if not options.weights:
        images = digits().train.unlabelled(1024, _BATCH, seed=0)
        yield "digits_vgg", load_model("digits_vgg"), tdecomp.Data(images, augment=None)
        pieces = list(docstrings().train[:256].split(32))
        yield "transformer", trained_transformer(), tdecomp.Data(pieces, mask=counted, augment=None)
    for entry in options.weights:
        name, _, file = entry.partition("=")
        data = image_folder(options.data, input_format(name), train_images=1024, val_images=1)
        batches = [x for x, _ in data.train.in_order(_BATCH)]
        yield name, load_model(name, file), tdecomp.Data(batches, augment=None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m benchmarks.layer_kinds` with these command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layer_kinds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="images as for `compare`")
    parser.add_argument("--weights", nargs="+", default=[], metavar="NETWORK=FILE")
    options = parser.parse_args(arguments)
    if options.weights and options.data is None:
        parser.error("--weights: layers are fitted to images; expected --data FOLDER")
    rows = [row for name, model, data in networks(options) for row in rows_of(name, model, data)]
    shares = [f"at {share:.0%}" for share in SHARES]
    headers = ["network", "layers", "number", "method", *shares]
    print(tabulate(rows, headers, disable_numparse=True))
    print(
        "\nshare of the layer's output variance lost, the median over the layers, at these shares "
        f"of the layer's MACs; torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
