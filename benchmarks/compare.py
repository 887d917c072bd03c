"""Compare decompositions of one model side by side, at several shares of its cost.

Without options: the digits network that ships with the repository. Each run is a row of a CSV file
in --out, written at once, with the machine and the versions in it; the tables go to standard
output, and to Markdown and LaTeX files beside it, the curves to SVG files.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.support.compare_options import DEFAULT_FINETUNE, build_parser
from benchmarks.support.comparison import STEPS, Protocol, compare, runs_of
from benchmarks.support.figure import draw_comparison
from benchmarks.support.rows import (
    NO_RECOVERY,
    ORIGINAL,
    Row,
    append_row,
    of_runs,
    read_rows,
    write_json,
    write_rows,
)
from benchmarks.support.settings import settings_of
from benchmarks.support.subject import DIGITS, Subject, named_subject, subject_of_file
from benchmarks.support.table import failures, format_tables
from benchmarks.support.verdict import verdict

# What all rows of one table have in common; the last two are 0 where they do not matter.
_WHERE_USED = ("images", "learning_rate")
_THE_SAME = ("model", "weights", "data", "equal", "val_images", "batch_size", "min_channels",
             *_WHERE_USED)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """Everything the options stand for, read and checked."""

    subject: Subject
    protocol: Protocol


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m benchmarks.compare` with these command-line arguments."""
    parser = build_parser(__doc__)
    options = parser.parse_args(arguments)
    try:
        if options.tables is None:
            job = prepare(options)
            rows = run(job, _file(options.out, job.subject.name, "csv"), resume=options.resume)
        else:
            rows = of_table(options.tables)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{_title(rows)}\n\n{format_tables(rows, 'text')}\n")
    for note in (*_notes(rows), *failures(rows)):
        print(f"* {note}")
    print(f"\n{verdict(rows)}\n")
    if options.tables is None:
        print(f"written: {_file(options.out, rows[0].run.model, 'csv')}")
    for path in write(options.out, rows):
        print(f"written: {path}")


def prepare(options: argparse.Namespace) -> Job:
    """Read the model and the data; a ValueError says which option is wrong, and why."""
    for steps in options.recover:
        unknown = {*steps.split("+")} - {*STEPS}
        if unknown and steps != NO_RECOVERY:
            raise ValueError(
                f"--recover: unknown step {min(unknown)!r}; there are {NO_RECOVERY}, "
                f"{', '.join(STEPS)}, joined by +"
            )
    own = options.model == DIGITS or options.model.endswith(".py")
    asked = {
        "--finetune": any(options.finetune or ()),
        "--recover": {*options.recover} != {NO_RECOVERY},
        "--fitted": "data" in (options.fitted or ()),
    }
    labelled = own or options.data is not None
    for name, needs_data in asked.items():
        if needs_data and not labelled:
            raise ValueError(f"{name} needs --data FOLDER")
    finetunes = options.finetune or ([0, DEFAULT_FINETUNE] if labelled else [0])
    fitted = options.fitted or (["weights", "data"] if labelled else ["weights"])
    settings = settings_of(options.methods, options.shares, fitted, options.ranks, options.equal)
    limits = {
        "train_images": max(max(finetunes) * options.batch_size, options.images),
        "val_images": options.val_images,
    }
    if options.model.endswith(".py"):
        subject = subject_of_file(Path(options.model), **limits)
    else:
        subject = named_subject(
            options.model, options.weights, options.data, seed=options.seeds[0], **limits
        )
    protocol = Protocol(
        settings, options.recover, finetunes, options.learning_rate, options.seeds,
        options.images, subject.judged,
        options.batch_size, options.min_channels, options.rounds,
    )  # fmt: skip
    return Job(subject, protocol)


def run(job: Job, file: Path, *, resume: bool) -> list[Row]:
    """The rows of all runs; with `resume` those that the file has are not computed again."""
    runs = runs_of(job.subject, job.protocol)
    known = read_rows(file) if resume else []
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and not resume:  # hours of work, perhaps
        file.replace(file.with_suffix(".csv.old"))
    write_rows(known, file)  # without a line that was cut off
    done = {row.run for row in known if row.found.reason is None}  # what failed is tried again
    todo = [one for one in runs if one not in done]
    for row in tqdm(compare(job.subject, job.protocol, todo), "runs", len(todo), disable=None):
        append_row(row, file)
        known.append(row)
    found = of_runs(known, runs)
    if all(row.found.reason for row in found if row.run.method != ORIGINAL):
        raise ValueError("nothing to compare:\n" + "\n".join(failures(found)))
    return found


def of_table(file: Path) -> list[Row]:
    """The rows of one comparison in a CSV file of this command; of a run told twice, the last."""
    rows = read_rows(file)
    if not rows:
        raise ValueError(f"--tables {file}: expected rows that this command wrote, got none")
    for name in _THE_SAME:
        # An original has no shares, of whatever cost.
        runs = (row.run for row in rows if row.run.method != ORIGINAL or name != "equal")
        found = {value for run in runs if (value := getattr(run, name)) or name not in _WHERE_USED}
        if len(found) > 1:
            raise ValueError(
                f"--tables {file}: expected the rows of one comparison, got {name} of "
                f"{' and '.join(sorted(map(str, found)))}; keep one of them in the file"
            )
    return of_runs(rows, dict.fromkeys(row.run for row in rows))


def write(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Write the JSON file, the tables and the pictures; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    model = rows[0].run.model
    written = [_file(folder, model, suffix) for suffix in ("json", "md", "tex")]
    write_json(rows, written[0])
    for path, style in zip(written[1:], ("markdown", "latex"), strict=True):
        path.write_text(_document(rows, style), encoding="utf-8")
    for y in ("quality", "output_error", "time_share"):
        path = _file(folder, f"{model}-{y.replace('_', '-')}", "svg")
        if draw_comparison(rows, path, y=y, title=_title(rows)):
            written.append(path)
    return written


def _document(rows: Sequence[Row], style: str) -> str:
    """The tables with their title and notes, which are comments in LaTeX."""
    notes = [*_notes(rows), *failures(rows)]
    head, item = ("%", "%") if style == "latex" else ("#", "-")
    told = "\n".join(f"{item} {note}" for note in notes)
    return f"{head} {_title(rows)}\n\n{format_tables(rows, style)}\n\n{told}\n"


def _file(folder: Path, name: str, suffix: str) -> Path:
    return folder / f"compare-{re.sub(r'[^a-zA-Z0-9_.]', '-', name)}.{suffix}"


def _title(rows: Sequence[Row]) -> str:
    """What was compared on what."""
    run = rows[0].run
    model = f"{run.model} with random weights" if run.weights == "random" else run.model
    return f"{model} on {run.data}" + (
        f", judged on {run.val_images:,} samples" if run.val_images else ""
    )


def _notes(rows: Sequence[Row]) -> list[str]:
    runs, made_on = [row.run for row in rows], rows[0].made_on
    notes = [
        "shares are of the whole model's cost; as a rule a method ends a little below",
        f"time: a batch of {runs[0].batch_size}, the median ratio to the original in turns with "
        f"it, on {made_on['torch_threads']} threads of {made_on['cpu']}",
        f"layers with fewer than {max(run.min_channels for run in runs)} channels or features on "
        "one side are left alone (--min-channels)",
    ]
    images = max(run.images for run in runs)
    if images:
        notes.append(f"data, and steps without labels: up to {images:,} training images")
    if runs[0].val_images:
        notes.append("output error: the share of the variance of the model's outputs that is lost")
    if any(run.finetune for run in runs):
        rates = ", ".join(sorted({f"{run.learning_rate:g}" for run in runs if run.finetune}))
        notes.append(f"fine-tuning: Adam at {rates} on labels, the same batches for every network")
    seeds = len({run.seed for run in runs})
    if seeds > 1:
        notes.append(f"mean ± standard deviation over {seeds} seeds")
    return notes


if __name__ == "__main__":
    main()
