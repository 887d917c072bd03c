"""The command line of `python -m benchmarks.compare`."""

import argparse
from pathlib import Path

from benchmarks.support.comparison import STEPS
from benchmarks.support.models import DEFAULT, TIMM, TORCHVISION
from benchmarks.support.rows import NO_RECOVERY
from benchmarks.support.settings import BUDGET, COSTS, UNIFORM, known_methods
from benchmarks.support.subject import DIGITS
from benchmarks.support.training import LEARNING_RATE

DEFAULT_METHODS = ("cp", "tucker2", "lowrank", "auto", "tensorly-tucker", "tensorly-cp")
DEFAULT_SHARES = (0.5, 0.25, 0.1)
DEFAULT_FINETUNE = 20
DEFAULT_IMAGES = 512


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """The options; what depends on the model or the data is checked by `prepare`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        default=DIGITS,
        help=f"{DIGITS} (the default), resnet20, vgg11_bn, {TORCHVISION}NAME, {TIMM}NAME, or "
        "FILE.py with model(), data() -> (train, val) and, if not accuracy, metric(model)",
    )
    add(
        "--weights",
        metavar=f"FILE|{DEFAULT}",
        help=f"a state dict (safetensors or torch.save), or {DEFAULT} for those that come with the "
        f"model; random ones otherwise, except for {DIGITS}",
    )
    add(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="images as FOLDER/train/<class>/* and FOLDER/val/<class>/*; without it there are "
        f"costs only, except for {DIGITS} and a .py file, which bring their own",
    )
    add(
        "--methods",
        nargs="+",
        default=DEFAULT_METHODS,
        metavar="METHOD",
        help=f"of {', '.join(known_methods())}, each with svd on Linear layers "
        f"(default: {' '.join(DEFAULT_METHODS)})",
    )
    add(
        "--shares",
        nargs="+",
        type=float,
        default=DEFAULT_SHARES,
        metavar="SHARE",
        help=f"of the whole model's cost (default: {' '.join(map(str, DEFAULT_SHARES))})",
    )
    add(
        "--equal",
        choices=COSTS,
        default=COSTS[0],
        help="which cost all methods get the same share of (default: %(default)s)",
    )
    add(
        "--ranks",
        nargs="+",
        choices=(UNIFORM, BUDGET),
        default=(UNIFORM,),
        metavar=f"{UNIFORM}|{BUDGET}",
        help=f"{UNIFORM}: every layer has the same share of its own cost, {BUDGET}: one for the "
        f"whole model, as auto, dense and --equal time always have (default: {UNIFORM})",
    )
    add(
        "--fitted",
        nargs="+",
        choices=("weights", "data"),
        metavar="weights|data",
        help="what the factors are fitted to (default: both where there is data)",
    )
    add(
        "--recover",
        nargs="+",
        default=(NO_RECOVERY,),
        metavar="STEPS",
        help=f"{NO_RECOVERY}, or steps of tdecomp joined by +, of {', '.join(STEPS)}; several are "
        "run each (default: none)",
    )
    add(
        "--finetune",
        nargs="+",
        type=_count,
        metavar="STEPS",
        help="fine-tuning steps with labels for every network; several are run each "
        f"(default: 0 {DEFAULT_FINETUNE} where there is data)",
    )
    add(
        "--learning-rate",
        type=float,
        default=LEARNING_RATE,
        help="of fine-tuning, by Adam, falling to 0 (default: %(default)s)",
    )
    add(
        "--images",
        type=_positive,
        default=DEFAULT_IMAGES,
        metavar="N",
        help="training images without labels, for fits and recovery (default: %(default)s)",
    )
    add(
        "--val-images",
        type=_positive,
        metavar="N",
        help="judge by N images drawn from FOLDER/val instead of by all of them",
    )
    add(
        "--seeds",
        nargs="+",
        type=int,
        default=(0,),
        metavar="SEED",
        help="each draws images and batches; tables have the mean ± standard deviation",
    )
    add(
        "--min-channels",
        type=_count,
        default=16,
        metavar="N",
        help="leave alone layers with fewer channels or features than this on one side, as a first "
        "convolution or a last Linear layer often has (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=_positive,
        default=64,
        help="of all images, and of the measured time (default: %(default)s)",
    )
    add("--rounds", type=_positive, default=5, help="of time measurements (default: %(default)s)")
    add("--resume", action="store_true", help="do not compute again the rows of --out's CSV file")
    add(
        "--tables",
        type=Path,
        metavar="FILE.csv",
        help="run nothing: print and draw the rows that such a file has",
    )
    add("--out", type=Path, default=Path("results"), metavar="FOLDER")
    return parser


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
