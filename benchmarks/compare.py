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


@dataclass(frozen=True)
class Job:
    """Everything the options stand for, read and checked."""

    subject: Subject
    protocol: Protocol

    @property
    def title(self) -> str:
        """What was compared on what."""
        subject, judged = self.subject, self.protocol.val_images
        model = (
            f"{subject.name} with random weights" if subject.weights == "random" else subject.name
        )
        return f"{model} on {subject.title}" + (f" ({judged} to judge by)" if judged else "")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m benchmarks.compare` with these command-line arguments."""
    parser = build_parser(__doc__)
    options = parser.parse_args(arguments)
    try:
        job = prepare(options)
        file = _file(options.out, job, "csv")
        rows = run(job, file, resume=options.resume)
    except ValueError as error:
        parser.error(str(error))
    print(f"{job.title}\n\n{format_tables(rows, 'text')}\n")
    for note in (*_notes(job, rows), *failures(rows)):
        print(f"* {note}")
    print(f"\n{verdict(rows)}\n")
    for path in (file, *write(options.out, job, rows)):
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
    val = 0 if subject.data is None else len(subject.data(options.seeds[0]).val)
    protocol = Protocol(
        settings, options.recover, finetunes, options.seeds, options.images, val,
        options.batch_size, options.min_channels, options.rounds,
    )  # fmt: skip
    return Job(subject, protocol)


def run(job: Job, file: Path, *, resume: bool) -> list[Row]:
    """The rows of all runs; with `resume` those that the file has are not computed again."""
    runs = runs_of(job.subject, job.protocol)
    known = read_rows(file) if resume else []
    file.parent.mkdir(parents=True, exist_ok=True)
    write_rows(known, file)  # without a line that was cut off
    done = {row.run for row in known}
    todo = [one for one in runs if one not in done]
    for row in tqdm(compare(job.subject, job.protocol, todo), "runs", len(todo), disable=None):
        append_row(row, file)
        known.append(row)
    found = of_runs(known, runs)
    if all(row.found.reason for row in found[1:]):
        raise ValueError("nothing to compare:\n" + "\n".join(failures(found)))
    return found


def write(folder: Path, job: Job, rows: Sequence[Row]) -> list[Path]:
    """Write the JSON file, the tables and the pictures; returns their paths."""
    write_json(rows, plain := _file(folder, job, "json"))
    written = [plain]
    for style, suffix in (("markdown", "md"), ("latex", "tex")):
        path = _file(folder, job, suffix)
        path.write_text(format_tables(rows, style) + "\n", encoding="utf-8")
        written.append(path)
    for y in ("quality", "output_error", "time_share"):
        path = _file(folder, job, "svg", f"-{y.replace('_', '-')}")
        if draw_comparison(rows, path, y=y, title=job.title):
            written.append(path)
    return written


def _file(folder: Path, job: Job, suffix: str, part: str = "") -> Path:
    return folder / f"compare-{re.sub(r'[^a-zA-Z0-9_.]', '-', job.subject.name)}{part}.{suffix}"


def _notes(job: Job, rows: Sequence[Row]) -> list[str]:
    protocol, made_on = job.protocol, rows[0].made_on
    notes = [
        "shares are of the whole model's cost; as a rule a method ends a little below",
        f"time: a batch of {protocol.batch_size}, median ratio to the original of "
        f"{protocol.rounds} rounds in turns, on {made_on['torch_threads']} threads of "
        f"{made_on['cpu']}",
        f"layers with fewer than {protocol.min_channels} channels or features on one side are "
        "left alone (--min-channels)",
    ]
    if any(setting.fitted == "data" for setting in protocol.settings):
        notes.append(f"data: fitted to what layers see in {protocol.images:,} images, no labels")
    if job.subject.data is not None:
        notes.append("output error: the share of the variance of the model's outputs that is lost")
    if any(protocol.finetunes):
        notes.append("fine-tuning: Adam on labels, the same batches for every network")
    if len(protocol.seeds) > 1:
        notes.append(f"mean ± standard deviation over {len(protocol.seeds)} seeds")
    return notes


if __name__ == "__main__":
    main()
