"""What large models and more workers take: time and memory, beside what they must reach.

Each part measures in processes of its own, so that memory is that of the part alone.

    python -m benchmarks.scale
    python -m benchmarks.scale large_layers calibration
    python -m benchmarks.scale --quick
"""

import argparse
import importlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tabulate import tabulate

from benchmarks.scale.row import ScaleRow
from benchmarks.support.machine import describe_machine, describe_versions

# Each is a module beside this one, with `run(options)` that returns its rows of the table.
PARTS = ("streaming", "killed", "executors", "calibration", "large_layers", "generation")
HEADERS = ("what", "bound", "measured", "within")


def build_parser() -> argparse.ArgumentParser:
    """The options, which every part gets."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    add("--quick", action="store_true", help="tiny sizes: whether it runs, not what it takes")
    add("--folder", type=Path, help="for checkpoints that are made (default: a temporary one)")
    return parser


def table(rows: Sequence[ScaleRow]) -> str:
    """The rows under the headers."""
    return tabulate([row.cells() for row in rows], HEADERS, disable_numparse=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m benchmarks.scale` with these command-line arguments."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as scratch:
        options.folder = options.folder or Path(scratch)
        options.folder.mkdir(parents=True, exist_ok=True)
        rows: list[ScaleRow] = []
        for part in options.parts or PARTS:
            began = time.perf_counter()
            found = importlib.import_module(f"benchmarks.scale.{part}").run(options)
            if options.quick:  # the bounds are those of the full sizes
                found = [replace(row, within=None) for row in found]
            rows += found
            print(f"{part}, {time.perf_counter() - began:.0f} s\n{table(found)}\n", flush=True)
    print(f"{table(rows)}\n\n{describe_machine()}\n{describe_versions()}")


if __name__ == "__main__":
    main()
