"""What a stream is to do, as plain data: whether a target that is there is of the same job."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tdecomp._distribution import VERSION
from tdecomp.checkpoint.description import CONFIG, KEY, plan_in
from tdecomp.files.json_file import read_json, write_json
from tdecomp.files.typed import typed
from tdecomp.layers.cost import Cost
from tdecomp.model.filters import Filters
from tdecomp.plans.data_notes import data_notes
from tdecomp.plans.plan import Plan
from tdecomp.plans.report import Report
from tdecomp.plans.row import Row
from tdecomp.streaming.choose import Asked, methods_of
from tdecomp.streaming.source import Source, open_folder
from tdecomp.streaming.target import WORK, WorkFolder

REPORT = "tdecomp.json"  # what was done: the job, and the rows with their errors
_FORM = 1


def job_of(
    source: Source, asked: Asked | Plan, filters: Filters, device: torch.device
) -> dict[str, Any]:
    """All that the result depends on; another run of the same job goes on with it."""
    return {
        "form": _FORM,
        "methods": list(map(_described, methods_of(asked))),
        "rank": _choices(asked) if isinstance(asked, Plan) else _described(asked.selector),
        "include": list(filters.include),
        "exclude": list(filters.exclude),
        "device": str(device),
        "source": {file: list(mark) for file, mark in source.marks.items()},
        "versions": _versions(),
    }


def _choices(plan: Plan) -> str:
    """A text that differs where plans do."""
    found = json.dumps([(row.name, row.method, row.rank) for row in plan])
    return f"those of the plan {hashlib.sha256(found.encode()).hexdigest()[:16]}"


def _described(what: Any) -> str:
    """Its repr, or what it consists of, without where it is in memory: that differs each time."""
    words = repr(what)
    if " object at 0x" in words:
        words = f"{type(what).__qualname__} {vars(what)}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", words)


def finished_report(target: Path, job: Mapping[str, Any], *, resume: bool) -> Report | None:
    """The report of a target that this very job finished; an error if it is another one's."""
    entries = list(target.iterdir()) if target.is_dir() else []
    if not entries:
        return None
    if not resume:
        raise ValueError(
            f"target: {target} is there already, and resume=False; expected a folder that is not "
            "there, or an empty one: delete it, or leave resume=True to go on with the same job"
        )
    done, begun = read_json(target / REPORT), WorkFolder(target).job()
    known = done["job"] if isinstance(done, dict) and "job" in done else begun
    if known is None and [entry.name for entry in entries] == [WORK]:
        return None  # it was stopped as it began
    if known is None:
        names = ", ".join(sorted(entry.name for entry in entries)[:3])
        raise ValueError(
            f"target: {target} has files that no stream wrote ({names}); expected its own folder"
        )
    if differing := _differing(known, job):
        raise ValueError(
            f"target: {target} is that of another job, which differs in {'; '.join(differing)}. "
            "Delete it, or choose another target"
        )
    if (report := report_in(target)) is not None:
        try:
            open_folder(target)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"target: {target} was finished, and is damaged: {error}. Delete all of it, and "
                "call again"
            ) from error
    return report


def report_in(target: Path) -> Report | None:
    """What the stream did that wrote this folder; None if none did, or none to its end."""
    done = read_json(target / REPORT)
    if not isinstance(done, dict) or not (target / CONFIG).is_file():
        return None
    rows = typed(tuple[Row, ...], done.get("rows"), "rows")
    rest = typed(Cost, done.get("everything_else"), "everything_else")
    config = read_json(target / CONFIG)
    methods = plan_in(config.get(KEY)).decomposers if any(row.method for row in rows) else {}
    return Report(rows, rest, methods, notes=data_notes(rows, None))


def write_report(target: Path, report: Report, job: Mapping[str, Any]) -> None:
    """Write what was done, without its seconds: every run of the same job writes the same bytes."""
    rows = [replace(row, fit_seconds=None).to_dict() for row in report.rows]
    rest = report.to_dict()["everything_else"]
    write_json(target / REPORT, {"job": dict(job), "rows": rows, "everything_else": rest})


def _differing(known: Mapping[str, Any], job: Mapping[str, Any]) -> list[str]:
    """In words, what of two jobs is not the same."""
    found = []
    for name in job:
        old, new = known.get(name), job[name]
        if isinstance(old, dict) and isinstance(new, dict):
            parts = [part for part in {**old, **new} if old.get(part) != new.get(part)]
            for part in parts:
                if name == "source":
                    found.append(f"{part} of the source: {_change(old.get(part), new.get(part))}")
                else:
                    found.append(f"{part}: {old.get(part)}, now {new.get(part)}")
        elif old != new:
            found.append(f"{name}: {old}, now {new}")
    return found


def _change(old: Any, new: Any) -> str:
    """In words, how a file of the source changed."""
    if old is None or new is None:
        return "it was not there" if old is None else "it is gone"
    if old[0] != new[0]:
        return f"it had {old[0]:,} bytes, now {new[0]:,}"
    return "its tensors changed" if old[2] != new[2] else "it was written again"


def _versions() -> dict[str, str]:
    found = {"tdecomp": VERSION, "torch": torch.__version__}
    for name in ("transformers", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found
