"""The folder that a stream writes: what goes where, what is done, and how it is finished.

Until all is done, everything is in a folder of its own in the target. Its files have their whole
headers from the beginning, so that every job knows its places.
"""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # of Windows: nothing there tells whether another process is at work
    fcntl = None  # type: ignore[assignment]

from tdecomp.files.index import INDEX_SUFFIX
from tdecomp.files.json_file import read_json, write_json
from tdecomp.files.shards import Layout
from tdecomp.layers.cost import count_in_words
from tdecomp.plans.plan import Plan
from tdecomp.streaming.work import Work

WORK = ".tdecomp-stream"  # within the target
_SHARDS, _RECORDS = "files", "records"
_JOB, _PLAN, _READY, _LOCK = "job.json", "plan.json", "ready.json", "lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class WorkFolder:
    """Where a stream into this target keeps what is not finished."""

    target: Path

    @property
    def path(self) -> Path:
        """The folder itself."""
        return self.target / WORK

    @property
    def files(self) -> Path:
        """Of the files with weights, in the making."""
        return self.path / _SHARDS

    @property
    def records(self) -> Path:
        """Of what has been done."""
        return self.path / _RECORDS

    def begin(self, job: Mapping[str, Any]) -> None:
        """Make the folders, and note what the job is."""
        for folder in (self.files, self.records):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(self.path / _JOB, job)

    def job(self) -> dict[str, Any] | None:
        """What the job is that began here; None if none did."""
        found: dict[str, Any] | None = read_json(self.path / _JOB)
        return found

    def plan(self) -> tuple[Plan, frozenset[str]] | None:
        """The plan and the rows with drafts, if they were noted."""
        found = read_json(self.path / _PLAN)
        return found and (Plan.from_dict(found["plan"]), frozenset(found["drafted"]))

    def keep_plan(self, plan: Plan, drafted: frozenset[str]) -> None:
        """Note the plan, so that nobody chooses again."""
        found = {"plan": plan.to_dict(), "drafted": sorted(drafted)}
        write_json(self.path / _PLAN, found)

    def lay_out(self, layouts: Mapping[str, Layout]) -> None:
        """Make the files with their headers, once."""
        if (self.path / _READY).exists():
            return
        for file, layout in layouts.items():
            with (self.files / file).open("wb") as opened:
                opened.write(layout.header)
                opened.truncate(layout.size)
                opened.flush()
                os.fsync(opened.fileno())
        write_json(self.path / _READY, [*layouts])

    def is_moving(self) -> bool:
        """Whether its files are being put into the target, where nothing more is needed."""
        return any(self.target.glob("*.safetensors"))

    def move_out(self, layouts: Mapping[str, Layout]) -> None:
        """Put the files that are finished into the target."""
        for file in layouts:
            if (self.files / file).exists():
                (self.files / file).replace(self.target / file)

    def remove(self) -> None:
        """Forget all of it; what the job is comes last."""
        for folder in (self.files, self.records, self.path):
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other process may work here; what is left without a result goes afterwards."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / _LOCK).open("w") as opened:
            if fcntl is not None:
                try:
                    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise ValueError(
                        f"target: another process is writing {self.target}; wait for it to end"
                    ) from error
            try:
                yield
            finally:
                if not (self.path / _PLAN).exists() and not any(self.records.glob("*.json")):
                    self.remove()
                    with suppress(OSError):  # it holds something else
                        self.target.rmdir()


def index_of(work: Work) -> dict[str, Any]:
    """What an index says of the files."""
    places = {n: file for file, layout in work.layouts.items() for n in layout.places}
    total = sum(p.nbytes for layout in work.layouts.values() for p in layout.places.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def write_index(target: Path, work: Work, whole: str) -> None:
    """Write the index, unless there is one file, of the name of a whole one."""
    if list(work.layouts) != [whole]:
        write_json(target / f"{whole}{INDEX_SUFFIX}", index_of(work))


def check_room(nbytes: int, work_folder: WorkFolder) -> None:
    """Refuse, before anything is written, a disk that has too little room for so much."""
    there = sum(
        512 * getattr(f.stat(), "st_blocks", 0) for f in work_folder.files.glob("*") if f.is_file()
    )
    needed, free = nbytes - there, shutil.disk_usage(work_folder.path).free
    if needed > free and not work_folder.is_moving():
        raise OSError(errno.ENOSPC, _no_room(work_folder.target, needed, free))


@contextmanager
def said_if_full(folder: Path, nbytes: int) -> Iterator[None]:
    """A disk that is full is told with what is needed, and that nothing is lost."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        words = f"{_no_room(folder, nbytes)}; what is done stays there: make room and call again"
        raise OSError(error.errno, words) from error


def _no_room(folder: Path, needed: int, free: int | None = None) -> str:
    there = "" if free is None else f", {count_in_words(free)}B are free"
    return f"{folder}: no room on the disk: the stream takes {count_in_words(needed)}B there{there}"
