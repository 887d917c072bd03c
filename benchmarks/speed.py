"""How long decomposing takes, against plain ways to the same factors, each beside its bound.

Ours and theirs are run in turns; medians are followed by the least and the most of all runs. Then
how fast decomposed networks run, as `benchmarks.latency` has it. All of it takes an hour or more.

    python -m benchmarks.speed --data FOLDER --weights vgg11_bn=FILE resnet20=FILE
    python -m benchmarks.speed --sections kernels --only "256 at 85"
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from tabulate import tabulate

from benchmarks import latency
from benchmarks.support import kernel_fits, model_fits
from benchmarks.support.machine import describe_machine, describe_versions
from benchmarks.support.pairs import HEADERS

# Each gives lines of one table, of the cases whose titles hold a word, measured so many times.
Rows = Callable[[str, int], Iterator[list[str]]]
SECTIONS: Mapping[str, Rows] = {
    "kernels": kernel_fits.rows,
    "models": model_fits.rows,
}
# Whole networks in measured time have a table of their own.
_ALL = (*SECTIONS, "latency")


def main(
    arguments: Sequence[str] | None = None,
    sections: Mapping[str, Rows] = SECTIONS,
    networks: Callable[[Sequence[str]], None] = latency.main,
) -> None:
    """Print one line per case as soon as it is measured, and a table of all in the end."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", help="cases whose title holds this")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each side (3)")
    parser.add_argument("--sections", nargs="+", choices=_ALL, default=_ALL)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", metavar="FOLDER", help="for trained networks, with --weights")
    parser.add_argument("--weights", nargs="+", default=[], metavar="NETWORK=FILE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    table = []
    for section in (name for name in options.sections if name in sections):
        for cells in sections[section](options.only, options.repeat):
            table.append(cells)
            told = zip(HEADERS, cells, strict=True)
            print("; ".join(f"{name} {cell}" for name, cell in told if cell), flush=True)
    print("\n" + tabulate(table, HEADERS, disable_numparse=True))
    facts = {**describe_machine(), **describe_versions(), "torch_threads": options.threads}
    print("\n" + ", ".join(f"{name} {value}" for name, value in facts.items()))
    if "latency" in options.sections and not options.only:
        folder = ["--data", options.data] if options.data else []
        networks([*folder, *(["--weights", *options.weights] if options.weights else [])])


if __name__ == "__main__":
    main()
