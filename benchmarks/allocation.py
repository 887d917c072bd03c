"""Which error of the single layers tells best what the whole network loses.

A budget minimises a sum over layers, so its terms must be comparable. Three ways to count them:

- weights: the share of each kernel's square that is lost (no data);
- outputs: the share of each output's variance that is lost;
- gradients: the variance of each output's error, weighted by the output's gradients (the default
  where there is data).

For each: how well it ranks the layers, measured by swapping one layer at a time (Spearman's rank
correlation with the loss of the network's outputs), and what a network loses whose ranks were
chosen by it, all fitted to the same data.

    python -m benchmarks.allocation --model resnet20 --weights FILE --data FOLDER
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from scipy.stats import spearmanr
from tabulate import tabulate
from torch import Tensor, nn

import tdecomp
from benchmarks.support.costs import count_macs
from benchmarks.support.data import image_folder
from benchmarks.support.models import input_format, load_model
from benchmarks.support.training import accuracy
from tdecomp.decomposers.registry import get_decomposer
from tdecomp.loss_curves.losses import LayerLosses

BATCH_SIZE = 128
PROBE = 0.3  # of each layer's MACs, when one layer at a time is swapped


def lost_outputs(model: nn.Module, original: nn.Module, batches: Sequence[Tensor]) -> float:
    """The share of the variance of the original's outputs that is lost."""
    with torch.inference_mode():
        wanted = torch.cat([original(batch) for batch in batches])
        found = torch.cat([model(batch) for batch in batches])
    return float((found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def single_swaps(
    model: nn.Module, method: str, batches: Sequence[Tensor], moments: tdecomp.Moments
) -> dict[str, list[float]]:
    """Each layer alone at the same share of its MACs: its errors, and what the network loses."""
    found: dict[str, list[float]] = {"weights": [], "outputs": [], "gradients": [], "network": []}
    share = tdecomp.Ratio(PROBE, of="macs")
    plan = tdecomp.plan(model, method, rank=share, example_inputs=batches[0][:1], progress=False)
    result = tdecomp.apply(model, plan, data=moments, progress=False)
    for row in result.report:
        if row.rank is None or row.layer is None:
            continue
        assert row.weight_error is not None
        assert row.output_error is not None
        weight = model.get_submodule(row.name).weight
        assert isinstance(weight, nn.Parameter)
        losses = LayerLosses(weight, row.layer, moments[row.name], row.calls)
        found["weights"].append(row.weight_error**2)
        found["outputs"].append(row.output_error)
        found["gradients"].append(losses.fitted(get_decomposer(method), row.rank)[0])
        swapped = copy.deepcopy(model)
        parent, _, child = row.name.rpartition(".")
        chain = result.model.get_submodule(row.name)
        setattr(swapped.get_submodule(parent), child, chain)
        found["network"].append(lost_outputs(swapped, model, batches))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m benchmarks.allocation` with these command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.allocation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="resnet20", help="resnet20 or vgg11_bn")
    parser.add_argument("--weights", required=True, metavar="FILE")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--methods", nargs="+", default=["lowrank", "spatial", "cp"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.3])
    parser.add_argument("--images", type=int, default=1024, help="unlabelled")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    model = load_model(options.model, options.weights)
    data = image_folder(
        options.data, input_format(options.model), train_images=options.images, seed=options.seed
    )
    batches = [x for x, _ in data.train.in_order(BATCH_SIZE)]
    example, original = batches[0][:1], accuracy(model, data.val)
    macs = count_macs(model, example)
    with_gradients = tdecomp.calibrate(model, batches, progress=False)
    without = tdecomp.calibrate(model, batches, gradients=False, progress=False)
    ways = {"weights": None, "outputs": without, "gradients": with_gradients}
    rows = []
    for method in options.methods:
        swaps = single_swaps(model, method, batches[:2], with_gradients)
        for budget in options.budgets:
            for way, moments in ways.items():
                plan = tdecomp.plan(
                    model,
                    [method, "svd"],
                    rank=tdecomp.Budget(macs=budget),
                    example_inputs=example,
                    data=moments,
                    progress=False,
                )
                small = tdecomp.apply(model, plan, data=with_gradients, progress=False).model
                rows.append(
                    [
                        method,
                        budget,
                        way,
                        f"{spearmanr(swaps[way], swaps['network']).statistic:.2f}",
                        f"{count_macs(small, example) / macs:.3f}",
                        f"{lost_outputs(small, model, batches):.4f}",
                        f"{100 * (original - accuracy(small, data.val)):+.2f}",
                    ]
                )
                print(*rows[-1], flush=True)
    headers = ["method", "budget", "by", "correlation", "MACs", "outputs lost", "drop (points)"]
    print(f"\n{options.model} on {data.title}, {options.images} unlabelled images, no refit")
    print(tabulate(rows, headers=headers, disable_numparse=True))


if __name__ == "__main__":
    main()
