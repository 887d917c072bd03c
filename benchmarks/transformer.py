"""What a small transformer loses, as a language model and as an encoder of texts.

It was trained on the docstrings of Python's standard library (`python -m benchmarks.train_text`).
One budget for its Linear layers, fitted to unlabelled pieces of text with their padding masked,
then refitted, then distilled, once for each seed, which draws the pieces. Judged on held-out files:
the loss in nats for each byte above the original's, and the cosine of embeddings to the original's,
both less the mean of the original's.

    python -m benchmarks.transformer
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional

import tdecomp
from benchmarks.accuracy import DISTILLED, FITTED, REFITTED, mean_and_spread
from benchmarks.support.costs import count_macs
from benchmarks.support.text import Text, counted, docstrings
from benchmarks.support.transformer import Encoder, held_out_nats, outputs, trained_transformer

SHARES = (0.75, 0.50, 0.35)
# The cosines asked for, of a sentence encoder that was trained for longer.
COSINES = {0.75: 0.99, 0.50: 0.95, 0.35: 0.90}


@dataclass(frozen=True)
class Use:
    """A model with the measure that it is judged by."""

    name: str
    measure: str
    model: nn.Module
    judge: Callable[[nn.Module], float]


def uses(text: Text) -> list[Use]:
    """The transformer as a language model and as an encoder."""
    language, encoder = trained_transformer(), Encoder(trained_transformer())
    nats_before, wanted = held_out_nats(language, text), outputs(encoder, text.val)

    def more_nats(model: nn.Module) -> float:
        return held_out_nats(model, text) - nats_before

    def cosine(model: nn.Module) -> float:
        mean, found = wanted.mean(dim=0), outputs(model, text.val)
        return float(functional.cosine_similarity(found - mean, wanted - mean).mean())

    return [
        Use("language model", f"nats above {nats_before:.3f}", language, more_nats),
        Use("encoder", "cosine", encoder, cosine),
    ]


def measure(use: Use, share: float, data: tdecomp.Data, steps: int | None) -> dict[str, float]:
    """What each stage comes to at this share of the Linear layers' MACs."""
    example, quiet = data.batches[0][:1], {"progress": False}
    budget = tdecomp.Budget(macs=share_of_all(use.model, example, share))
    options: dict[str, Any] = {"rank": budget, "example_inputs": example, "data": data, **quiet}
    model = tdecomp.decompose(use.model, "svd", **options).model
    found = {FITTED: use.judge(model)}
    recoveries: dict[str, Callable[..., Any]] = {REFITTED: tdecomp.refit}
    if steps != 0:
        recoveries[DISTILLED] = partial(tdecomp.distill, steps=steps)
    for stage, recover in recoveries.items():
        model = recover(model, use.model, data, **quiet).model
        found[stage] = use.judge(model)
    return found


def share_of_all(model: nn.Module, example: Tensor, share: float) -> float:
    """The share of the whole model's MACs at which its Linear layers have this share of theirs."""
    whole = count_macs(model, example)
    rows = tdecomp.plan(model, "svd", rank=1, example_inputs=example, progress=False)
    linear = sum(row.macs_before or 0 for row in rows)
    return 1 - (1 - share) * linear / whole


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m benchmarks.transformer` with these command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transformer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    parser.add_argument("--pieces", type=int, default=512, help="unlabelled (default: 512)")
    parser.add_argument("--steps", type=int, help="of the distillation; 0 leaves it out")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    options = parser.parse_args(arguments)
    text, rows = docstrings(), []
    for use in uses(text):
        for share in options.shares:
            found = []
            for seed in options.seeds:
                order = torch.randperm(
                    len(text.train), generator=torch.Generator().manual_seed(seed)
                )
                drawn = text.train[order[: options.pieces]]
                data = tdecomp.Data(list(drawn.split(32)), mask=counted, augment=None)
                found.append(measure(use, share, data, options.steps))
            stages = {stage: [one[stage] for one in found] for stage in found[0]}
            columns = {stage: mean_and_spread(v, ".4f") for stage, v in stages.items()}
            wanted = COSINES.get(share, "") if use.measure == "cosine" else ""
            rows.append(
                {
                    "as": use.name,
                    "Linears' MACs": share,
                    "measure": use.measure,
                    **columns,
                    "asked": wanted,
                }
            )
            print(tabulate(rows[-1:], headers="keys"), flush=True)
    print(f"\n{tabulate(rows, headers='keys')}\n")
    print(f"* mean ± standard deviation over the seeds {', '.join(map(str, options.seeds))}")


if __name__ == "__main__":
    main()
