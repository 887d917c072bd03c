"""Which rates, schedules and weight decay suit factors: fine-tuning with labels by plain Adam.

A ResNet-20 gets a share of its MACs by one budget and one method, fitted to its weights or to
unlabelled training images (`svd` takes the Linear layer alone, which gets this share of its own).
Then all is trained for some steps, without clipping gradients or changing images. Rows of the
original are the same training from its own weights. Without a file of weights it is the small VGG
on digits that ships with the benchmarks.

    python -m benchmarks.fine_tuning --weights FILE --data FOLDER

A few lines quickly: --methods cp --shares 0.25 --fitted data --rates 1e-3 --schedules constant.
"""

import argparse
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import Tensor, nn

import tdecomp
from benchmarks.support.data import Dataset, digits, image_folder
from benchmarks.support.factor_training import (
    DECAYS,
    SCHEDULES,
    Judged,
    Losses,
    Training,
    judge,
    train,
)
from benchmarks.support.machine import describe_machine, describe_versions
from benchmarks.support.models import input_format, load_model

NETWORK, SMALL, ORIGINAL = "resnet20", "digits_vgg", "original"
METHODS = ("svd", "lowrank", "spatial", "tucker2", "cp", "cp-separable")
SHARES, FITTED = (0.5, 0.25), ("weights", "data")
RATES = (1e-4, 1e-3, 1e-2)
_UNLABELLED = 1024


@dataclass(frozen=True)
class Start:
    """A network to fine-tune; the original where there is no method."""

    method: str = ORIGINAL
    share: float = 1.0
    fitted: str = ""

    def build(self, model: nn.Module, example: Tensor, moments: tdecomp.Moments) -> nn.Module:
        """The network, apart from the model."""
        if self.method == ORIGINAL:
            return copy.deepcopy(model)
        options: dict[str, Any] = {"data": moments} if self.fitted == "data" else {}
        alone = self.method == "svd"  # one method for Linear layers reaches no share of a ConvNet's
        methods = list(dict.fromkeys((self.method, "svd")))
        rank = tdecomp.Ratio(self.share, of="macs") if alone else tdecomp.Budget(macs=self.share)
        return tdecomp.decompose(
            model, methods, rank=rank, example_inputs=example, progress=False, **options
        ).model


@dataclass(frozen=True)
class Result:
    """A network before and after a training."""

    start: Start
    training: Training
    before: Judged
    after: Judged
    losses: Losses


def measure(
    model: nn.Module,
    data: Dataset,
    starts: Sequence[Start],
    trainings: Sequence[Training],
    seed: int,
) -> Iterator[Result]:
    """Each network through each training."""
    batches = data.train.unlabelled(_UNLABELLED, 128, seed)
    moments = tdecomp.calibrate(model, batches, progress=False)
    for start in starts:
        network = start.build(model, batches[0][:1], moments)
        before = judge(network, data.val)
        for training in trainings:
            trained = copy.deepcopy(network)
            losses = train(trained, data.train, training, seed)
            yield Result(start, training, before, judge(trained, data.val), losses)


def table(results: Sequence[Result]) -> str:
    """One line for each network and training."""
    rows = []
    for result in results:
        start, training, losses = result.start, result.training, result.losses
        decay = training.decay if training.decay == "none" else f"{training.strength:g} of the "
        rows.append(
            [
                start.method,
                start.share,
                start.fitted,
                f"{training.rate:g}",
                training.schedule,
                decay if training.decay == "none" else f"{decay}{training.decay}",
                training.steps,
                f"{100 * result.before.accuracy:.2f}",
                f"{100 * result.after.accuracy:.2f}",
                f"{result.after.loss:.3f}",
                f"{losses.last:.3f}",
                f"{losses.largest:.3f}",
            ]
        )
    headers = [
        "method", "MACs", "fitted to", "rate", "schedule", "weight decay", "steps",
        "accuracy\nbefore", "accuracy\nafter", "loss\nafter", "in training,\nlast steps",
        "in training,\nlargest",
    ]  # fmt: skip
    return tabulate(rows, headers=headers, disable_numparse=True)


def _subject(options: argparse.Namespace) -> tuple[nn.Module, Dataset]:
    """The trained network, and as many images as are trained on."""
    if options.weights is None:
        return load_model(SMALL), digits()
    return load_model(NETWORK, options.weights), image_folder(
        options.data,
        input_format(NETWORK),
        train_images=max(options.steps * options.batch_size, _UNLABELLED),
        val_images=options.val_images,
        seed=options.seed,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m benchmarks.fine_tuning` with these command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fine_tuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--weights", metavar="FILE", help="of a ResNet-20")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="FOLDER/train and FOLDER/val")
    parser.add_argument("--methods", nargs="+", default=(ORIGINAL, *METHODS))
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of the MACs")
    parser.add_argument("--fitted", nargs="+", choices=FITTED, default=FITTED)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    schedules = tuple(SCHEDULES)
    parser.add_argument("--schedules", nargs="+", choices=schedules, default=schedules)
    parser.add_argument("--decays", nargs="+", choices=tuple(DECAYS), default=("none",))
    parser.add_argument("--strength", type=float, default=5e-4, help="of the weight decay")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--val-images", type=int, help="to judge by (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="draws images and batches")
    options = parser.parse_args(arguments)
    starts = dict.fromkeys(
        Start() if method == ORIGINAL else Start(method, share, fitted)
        for share, fitted, method in product(options.shares, options.fitted, options.methods)
    )
    trainings = [
        Training(rate, schedule, decay, options.strength, options.steps, options.batch_size)
        for rate, schedule, decay in product(options.rates, options.schedules, options.decays)
    ]
    if (options.weights is None) != (options.data is None):
        parser.error("expected --weights and --data together, or neither")
    try:
        model, data = _subject(options)
    except ValueError as error:
        parser.error(str(error))
    results: list[Result] = []
    for result in measure(model, data, list(starts), trainings, options.seed):
        results.append(result)
        print(table([result]).splitlines()[-1], flush=True)
    machine = describe_machine()
    print(f"\n{table(results)}\n")
    print(
        f"* {type(model).__name__} on {data.title}, {len(data.val)} images to judge by; "
        f"plain Adam, batches of {options.batch_size}, seed {options.seed}; "
        "losses without the weight decay"
    )
    print(f"* {machine['torch_threads']} threads of {machine['cpu']}; {describe_versions()}")


if __name__ == "__main__":
    main()
