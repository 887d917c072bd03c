"""What a rank for each of queries, keys and values gains over one SVD of their fused layer.

The small transformer over text that ships with the repository, with its queries, keys and values
in one layer. First these layers alone: the share of their output's variance that is lost at equal
shares of their MACs, on samples that are held out. Then the whole model at one budget for all
Linear layers: the loss in nats for each byte above the original's, on held-out files.

    python -m benchmarks.fused_qkv
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tabulate import tabulate

import tdecomp
from benchmarks.layer_kinds import SHARES as LAYER_SHARES
from benchmarks.support.text import Text, counted, docstrings
from benchmarks.support.transformer import ByteTransformer, fused_transformer, held_out_nats
from benchmarks.transformer import SHARES, share_of_all

METHODS = ("svd", "split-svd")
QUIET: dict[str, Any] = {"progress": False}


def layer_rows(model: ByteTransformer, data: tdecomp.Data) -> Iterator[dict[str, object]]:
    """One row for each fused layer and share of its MACs."""
    moments = tdecomp.calibrate(model, data, gradients=False, **QUIET)
    for share in LAYER_SHARES:
        reports = {
            method: tdecomp.decompose(
                model, method, rank=tdecomp.Ratio(share, of="macs"), include="*.qkv",
                example_inputs=data.batches[0][:1], data=moments, **QUIET,
            ).report
            for method in METHODS
        }  # fmt: skip
        for row in reports["svd"]:
            split = reports["split-svd"][row.name]
            if row.method is not None:
                yield {
                    "layer": row.name,
                    "MACs": f"{share:.0%}",
                    "svd": row.output_error,
                    "split-svd": split.output_error,
                    "rank": row.rank,
                    "ranks": split.rank,
                }


def model_row(
    model: ByteTransformer, text: Text, data: tdecomp.Data, share: float
) -> dict[str, object]:
    """Nats above the original's at this share of the Linear layers' MACs."""
    example, found = data.batches[0][:1], dict[str, float]()
    budget = tdecomp.Budget(macs=share_of_all(model, example, share))
    taken = 0
    for methods in (["svd"], ["svd", "split-svd"]):
        result = tdecomp.decompose(
            model, methods, rank=budget, example_inputs=example, data=data, **QUIET
        )
        found[" or ".join(methods)] = held_out_nats(result.model, text) - held_out_nats(model, text)
        taken = sum(row.method == "split-svd" for row in result.report)
    return {"Linears' MACs": share, **found, "split": taken}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m benchmarks.fused_qkv` with these command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fused_qkv",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pieces", type=int, default=512, help="unlabelled (default: 512)")
    options = parser.parse_args(arguments)
    text, model = docstrings(), fused_transformer()
    order = torch.randperm(len(text.train), generator=torch.Generator().manual_seed(0))
    pieces = text.train[order[: options.pieces]]
    data = tdecomp.Data(list(pieces.split(32)), mask=counted, augment=None)
    print(tabulate(list(layer_rows(model, data)), headers="keys", floatfmt=".4f"))
    print("\nshare of the layer's output variance lost\n")
    rows = [model_row(model, text, data, share) for share in SHARES]
    print(tabulate(rows, headers="keys", floatfmt=".4f"))
    print(
        "\nnats for each byte above the original's; split: the number of layers that split-svd "
        f"takes; torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
