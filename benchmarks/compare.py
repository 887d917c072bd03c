"""Compare decompositions of one model side by side.

Without options: the digits network that ships with the repository. The table goes to standard
output; the same numbers, with every layer's, go to a JSON file, and a picture of them to a PNG
file, both in --out.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import tdecomp
from benchmarks.support.comparison import Comparison, Protocol, compare
from benchmarks.support.data import Dataset, digits, image_folder
from benchmarks.support.figure import draw_comparison
from benchmarks.support.machine import describe_machine, describe_versions
from benchmarks.support.models import DEFAULT, TORCHVISION, InputFormat, input_format, load_model
from benchmarks.support.settings import BUDGET, GROUPS, RANK_SYNTAX, Setting, parse_rank
from benchmarks.support.table import format_table
from benchmarks.support.verdict import verdict

DEFAULT_MODEL = "digits_vgg"
DEFAULT_METHODS = ("cp", "cp-separable", "tucker2", "lowrank")
DEFAULT_RANK = "0.1"
DEFAULT_FINETUNE = 100
DEFAULT_DATA_IMAGES = 1024


@dataclass(frozen=True)
class Job:
    """Everything the options stand for, read and checked."""

    model: nn.Module
    images: InputFormat
    data: Dataset | None
    settings: list[Setting]
    protocol: Protocol


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m benchmarks.compare` with these command-line arguments."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        job = prepare(options)
        comparison = run(job)
    except ValueError as error:
        parser.error(str(error))
    print(f"{title(options, job)}\n")
    print(format_table(comparison.measurements, finetune=job.protocol.finetune))
    print()
    for note in (*_notes(job, comparison), *_refusals(comparison)):
        print(f"* {note}")
    print(f"\n{verdict(comparison.measurements)}\n")
    for path in write(options, job, comparison):
        print(f"written: {path}")


def build_parser() -> argparse.ArgumentParser:
    """The options; what depends on the model or the data is checked by `prepare`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help=f"digits_vgg (the default), resnet20, vgg11_bn or {TORCHVISION}NAME",
    )
    parser.add_argument(
        "--weights",
        metavar=f"FILE|{DEFAULT}",
        help=f"a state dict (safetensors or torch.save), or {DEFAULT} for those that come with the "
        "model; random ones otherwise, except for digits_vgg",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="images as FOLDER/train/<class>/* and FOLDER/val/<class>/*; without it there are no "
        "accuracies, except for digits_vgg, which brings its own",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help=f"for the convolutions, each with svd on Linear layers, or {' or '.join(GROUPS)} "
        f"(default: {' '.join(DEFAULT_METHODS)}, and where there is data auto with one budget)",
    )
    parser.add_argument(
        "--rank",
        nargs="+",
        metavar="RANK",
        help=f"{RANK_SYNTAX}; several make one line, or two with data, each "
        f"(default: {DEFAULT_RANK}, and vbmf for tucker2)",
    )
    parser.add_argument(
        "--min-channels",
        type=_count,
        default=16,
        metavar="N",
        help="leave alone layers with fewer channels or features than this on one side, as a first "
        "convolution or a last Linear layer often has: they cost little and hold much "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--finetune",
        type=_count,
        metavar="STEPS",
        help="fine-tuning steps for every network; 0 for none "
        f"(default: {DEFAULT_FINETUNE} where there is data)",
    )
    parser.add_argument(
        "--data-images",
        type=_count,
        metavar="N",
        help="fit every network once more, to what its layers see in N training images without "
        "their labels, and a network with a budget only so; 0 for weights alone "
        f"(default: {DEFAULT_DATA_IMAGES:,}, or all there are, where there is data)",
    )
    parser.add_argument(
        "--batch-size",
        type=_positive,
        default=64,
        help="of the images without labels, the fine-tuning and the latency (default: %(default)s)",
    )
    parser.add_argument(
        "--val-images",
        type=_positive,
        metavar="N",
        help="judge by N images drawn from FOLDER/val instead of by all of them",
    )
    parser.add_argument("--rounds", type=_positive, default=15, help="of latency measurements")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="FOLDER")
    return parser


def prepare(options: argparse.Namespace) -> Job:
    """Read the model and the data; a ValueError says which option is wrong, and why."""
    own_data = options.model == DEFAULT_MODEL
    data_images = _default(options.data_images, DEFAULT_DATA_IMAGES)
    if not own_data and options.data is None:
        if options.finetune or options.data_images:
            name = "--finetune" if options.finetune else "--data-images"
            raise ValueError(f"{name} needs --data FOLDER")
        data_images = 0
    settings = choose_settings(options.methods, options.rank, data=data_images > 0)
    images = input_format(options.model)
    if own_data and options.data is not None:
        raise ValueError(f"{options.model} takes 8×8 digits and brings them; leave out --data")
    model = load_model(options.model, options.weights, seed=options.seed)
    steps = _default(options.finetune, DEFAULT_FINETUNE)
    data = digits() if own_data else None
    if options.data is not None:
        data = image_folder(
            options.data,
            images,
            train_images=max(steps * options.batch_size, data_images),
            val_images=options.val_images,
            seed=options.seed,
        )
        _check_classes(model, images, data, options)
    protocol = Protocol(
        min_channels=options.min_channels,
        finetune=steps if data is not None else 0,
        batch_size=options.batch_size,
        seed=options.seed,
        rounds=options.rounds,
        data_images=min(data_images, 0 if data is None else len(data.train)),
    )
    return Job(model, images, data, settings, protocol)


def choose_settings(
    methods: Sequence[str] | None, ranks: Sequence[str] | None, *, data: bool = False
) -> list[Setting]:
    """Every method at every rank, with data each of them twice: fitted to weights, then to data.

    By default also Tucker-2 with the ranks that VBMF finds and, with data, one budget for each
    share of the MACs.
    """
    known = (*tdecomp.registered(), *GROUPS)
    for method in methods or ():
        if method not in known:
            raise ValueError(f"unknown method {method!r}; there are {', '.join(known)}")
    for rank in ranks or ():
        parse_rank(rank)
    chosen = list(itertools.product(methods or DEFAULT_METHODS, ranks or (DEFAULT_RANK,)))
    if ranks is None and any(method == "tucker2" for method, _ in chosen):
        chosen.append(("tucker2", "vbmf"))
    if methods is None and data:
        shares = [r for r in ranks or (DEFAULT_RANK,) if isinstance(parse_rank(r), tdecomp.Ratio)]
        chosen += [("auto", f"{BUDGET}:{share}") for share in shares]
    settings: list[Setting] = []
    for method, rank in chosen:
        if data and rank.startswith(BUDGET):
            settings.append(Setting(method, rank, data=True, refit=True))
            continue
        settings.append(Setting(method, rank))
        if data:
            settings.append(Setting(method, rank, data=True))
    return list(dict.fromkeys(settings))


def run(job: Job) -> Comparison:
    """Measure; the batch is one of the data's where there is data, noise elsewhere."""
    batch_size = job.protocol.batch_size
    if job.data is not None:
        batch, _ = job.data.val.at(torch.arange(batch_size) % len(job.data.val))
    else:
        generator = torch.Generator().manual_seed(job.protocol.seed)
        shape = (batch_size, job.images.channels, job.images.side, job.images.side)
        batch = torch.randn(shape, generator=generator)
    return compare(job.model, job.settings, batch[:1], batch, job.data, job.protocol)


def title(options: argparse.Namespace, job: Job) -> str:
    """What was compared on what."""
    model = str(options.model)
    if options.weights is None and model != DEFAULT_MODEL:
        model += " with random weights"
    if job.data is None:
        return f"{model} on random images"
    return f"{model} on {job.data.title} ({len(job.data.val)} images to judge by)"


def write(options: argparse.Namespace, job: Job, comparison: Comparison) -> tuple[Path, Path]:
    """Write the JSON and the PNG file; returns their paths."""
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"compare-{options.model.replace(':', '-')}"
    table, picture = options.out / f"{stem}.json", options.out / f"{stem}.png"
    content = {
        "title": title(options, job),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "arguments": {name: _plain(value) for name, value in vars(options).items()},
        "settings": [setting.label for setting in job.settings],
        "protocol": vars(job.protocol),
        "notes": list(_notes(job, comparison)),
        "verdict": verdict(comparison.measurements),
        "refused": comparison.refused,
        "measurements": [m.to_dict() for m in comparison.measurements],
    }
    table.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draw_comparison(
        comparison.measurements,
        picture,
        title=title(options, job),
        finetune=job.protocol.finetune,
    )
    return table, picture


def _notes(job: Job, comparison: Comparison) -> list[str]:
    machine = describe_machine()
    spread = max(
        (m.latency.quartiles[1] - m.latency.quartiles[0]) / m.latency.median
        for m in comparison.measurements
        if m.latency is not None
    )
    protocol = job.protocol
    notes = [
        "params and MACs are the whole model's, MACs those of one image; × is of the original",
        f"latency: batches of {protocol.batch_size}, median of {protocol.rounds} rounds in which "
        f"all networks take turns, on {machine['torch_threads']} threads of {machine['cpu']}; "
        f"quartiles at most {spread:.0%} of the median apart",
        "weight error: ‖W − W̃‖ / ‖W‖, the mean over the changed layers",
    ]
    if protocol.min_channels:
        notes.append(
            f"layers with fewer than {protocol.min_channels} channels or features on one side are "
            "left alone (--min-channels)"
        )
    if job.data is not None:
        notes.append(
            "output error: the share of a layer's output variance lost, the mean over the changed "
            "layers, each run on the inputs that the original gives it for images judged by"
        )
    if comparison.calibration_seconds is not None:
        notes.append(
            f"+ data: the same chains, fitted to what the layers see in {protocol.data_images:,} "
            f"training images without labels (one pass for all lines: "
            f"{comparison.calibration_seconds:.1f} s, not in their fit)"
        )
    if any(setting.refit for setting in job.settings):
        notes.append(
            "+ refit: then every chain once more, in the order of the network, on the inputs that "
            "the smaller network gives it; its errors by layer say little of the whole network's"
        )
    if any(setting.rank.startswith(BUDGET) for setting in job.settings):
        notes.append(
            f"{BUDGET}: one share of the model's MACs, and the method and rank of every layer "
            "that lose least for it; of ranks the table says how many layers got which method"
        )
    if job.data is not None and protocol.finetune:
        notes.append(
            "every network, the original too, is fine-tuned with labels for the same "
            f"{protocol.finetune} steps on the same batches of {protocol.batch_size}"
        )
    return notes


def _refusals(comparison: Comparison) -> list[str]:
    return [f"{label} left out: {reason}" for label, reason in comparison.refused.items()]


def _check_classes(
    model: nn.Module, images: InputFormat, data: Dataset, options: argparse.Namespace
) -> None:
    with torch.inference_mode():
        outputs = model(torch.zeros(1, images.channels, images.side, images.side)).shape[1]
    if outputs != data.classes:
        raise ValueError(
            f"{options.model} tells {outputs} classes apart, but {options.data} has "
            f"{data.classes} class folders"
        )


def _default(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {value}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


if __name__ == "__main__":
    main()
