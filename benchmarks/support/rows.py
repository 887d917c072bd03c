"""Results as one tidy table: a row is one network, measured once, with what it was measured on."""

import csv
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

ORIGINAL = "original"
NO_RECOVERY = "none"


@dataclass(frozen=True)
class Run:
    """What makes a row what it is; a row is not computed again where all of this is the same."""

    model: str
    weights: str
    data: str
    method: str
    fitted: str = "weights"  # or "data"
    ranks: str = "uniform"  # every layer the same share, or "budget": one for the whole model
    equal: str = "macs"  # of which each method gets the same share: macs, params or time
    share: float = 1.0  # asked for
    recover: str = NO_RECOVERY  # steps without labels, joined by +
    finetune: int = 0  # steps with labels
    learning_rate: float = 0.0  # of fine-tuning, where there is any
    seed: int = 0
    images: int = 0  # without labels
    val_images: int = 0
    batch_size: int = 64
    min_channels: int = 16

    @property
    def stage(self) -> tuple[str, int]:
        """What was done after the decomposition."""
        return self.recover, self.finetune


@dataclass(frozen=True)
class Found:
    """What was measured; None where it does not apply, and all of it where the run failed."""

    layers: int | None = None  # decomposed
    params: int | None = None
    macs: int | None = None  # of one sample
    params_share: float | None = None
    macs_share: float | None = None
    time_ms: float | None = None
    time_share: float | None = None  # the median ratio to the original in the same round
    time_low: float | None = None  # its quartiles
    time_high: float | None = None
    measure: str | None = None  # what quality is: accuracy (%) or a metric of the user's
    quality: float | None = None
    output_error: float | None = None  # the share of the variance of the model's outputs
    seconds: float | None = None  # decomposing and recovering, without fine-tuning
    reason: str | None = None  # why there is nothing


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    run: Run
    found: Found
    made_on: Mapping[str, str]  # machine and versions

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self.run), **asdict(self.found), **self.made_on}


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file that `append_row` wrote; none if there is no file.

    A last line that was cut off is left out.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not reader.fieldnames:  # stopped before anything was written
            return []
        known = {field.name for kind in (Run, Found) for field in fields(kind)}
        if not known <= set(reader.fieldnames or ()):
            raise ValueError(
                f"{path} holds no rows of this command: it has no column "
                f"{', '.join(sorted(known - set(reader.fieldnames or ())))}; move it, or leave "
                "out --resume"
            )
        whole = [line for line in reader if None not in line.values()]
    rest = [name for name in reader.fieldnames or () if name not in known]
    try:
        return [
            Row(_parsed(Run, line), _parsed(Found, line), {name: line[name] for name in rest})
            for line in whole
        ]
    except ValueError as error:
        raise ValueError(f"{path} has a line that this command did not write: {error}") from error


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Write a CSV file with these rows and nothing else."""
    rows = list(rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            _write(file, row, header=i == 0)


def append_row(row: Row, path: Path) -> None:
    """Add a row at once, so that what was computed stays when the command is stopped."""
    with path.open("a", newline="", encoding="utf-8") as file:
        _write(file, row, header=file.tell() == 0)


def write_json(rows: Sequence[Row], path: Path) -> None:
    """The same rows as a list of objects."""
    content = json.dumps([row.to_dict() for row in rows], indent=1, ensure_ascii=False)
    path.write_text(content + "\n", encoding="utf-8")


def of_runs(rows: Iterable[Row], runs: Iterable[Run]) -> list[Row]:
    """The rows of these runs, in their order; of a run that is there twice, the last."""
    found = {row.run: row for row in rows}
    return [found[run] for run in runs if run in found]


def _write(file: typing.TextIO, row: Row, *, header: bool) -> None:
    content = row.to_dict()
    writer = csv.DictWriter(file, list(content), lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerow(content)


def _parsed(kind: type[Any], line: Mapping[str, str]) -> Any:
    """A Run or a Found of the cells of a line."""
    types_of = typing.get_type_hints(kind)
    return kind(**{name: _value(hint, line[name]) for name, hint in types_of.items()})


def _value(hint: Any, cell: str) -> Any:
    if isinstance(hint, types.UnionType):
        if not cell:
            return None
        hint = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    return hint(cell)
