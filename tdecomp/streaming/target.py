"""The folder that a stream writes: what goes where, what is done, and how it is finished.

Until all is done, everything is in a folder of its own in the target. Its files have their whole
headers from the beginning, so that every job knows its places.
"""

import errno
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # of Windows: nothing there tells whether another process is at work
    fcntl = None  # type: ignore[assignment]

from tdecomp.decomposers.assemble import empty_chain
from tdecomp.decomposers.tied import tied_chains
from tdecomp.files.shards import Layout, Stored, layout_of, name_of
from tdecomp.files.whole_file import whole_file
from tdecomp.layers.cost import count_in_words
from tdecomp.plans.plan import Plan
from tdecomp.plans.row import Row
from tdecomp.plans.rows import row_groups
from tdecomp.runtime.parallel import in_single_threads
from tdecomp.streaming.jobs import Copy, Fit, Rewrite
from tdecomp.streaming.layers import FolderLayers, Values
from tdecomp.streaming.source import INDEX, SINGLE, Source

WORK = ".tdecomp-stream"  # within the target
_SHARDS, _RECORDS = "files", "records"
_JOB, _PLAN, _READY, _LOCK = "job.json", "plan.json", "ready.json", "lock"
_COPIED_AT_ONCE = 2**28  # bytes of a file that are copied by one job
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# What a new tensor is, before it has a place: its dtype, its shape, its bytes.
_Described = tuple[str, tuple[int, ...], int]


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


def write_json(path: Path, data: Any) -> None:
    """Write plain data, wholly or not at all."""
    with whole_file(path) as draft, draft.open("w", encoding="utf-8") as opened:
        opened.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        opened.flush()
        os.fsync(opened.fileno())


def read_json(path: Path) -> Any:
    """What a file of plain data holds; None if there is none."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


@dataclass(frozen=True)
class Work:
    """All that has to be done once there is a plan."""

    layouts: Mapping[str, Layout]  # by the names of the files
    fits: Sequence[Fit]
    copies: Sequence[Copy]
    rewrites: Sequence[Rewrite]

    @property
    def nbytes(self) -> int:
        """Of all files that are written."""
        return sum(layout.size for layout in self.layouts.values())


def work_of(source: Source, found: FolderLayers, plan: Plan, drafted: frozenset[str]) -> Work:
    """What has to be fitted, what copied, and where all of it goes."""
    groups = row_groups(plan)
    described = {rows[0].name: _new_tensors(rows, plan, found) for rows in groups}
    home: dict[str, dict[str, _Described]] = defaultdict(dict)
    gone: set[str] = set()
    for rows in groups:
        first = found.layers[rows[0].name].weight.parts[0][0].file
        home[first] |= described[rows[0].name]
        gone.update(name for row in rows for name in found.consumed[row.name])
    moved = dict(_moved(plan, found))
    for name, values in moved.items():
        home[values.parts[0][0].file][name] = (
            values.parts[0][0].dtype, values.shape, values.nbytes
        )  # fmt: skip
        gone.update(found.consumed[name.rpartition(".")[0]])
    for name, stored in source.tensors.items():
        if name not in gone:
            home[stored.file][name] = stored.dtype, stored.shape, stored.nbytes
    files = [file for file in source.shards if home.get(file)]
    names = _shard_names(len(files), single=len(source.shards) == 1)
    # As safetensors orders them itself, so that every tensor is aligned to its dtype.
    ordered = {
        new: dict(sorted(home[old].items(), key=lambda item: (-_width(item[1]), item[0])))
        for old, new in zip(files, names, strict=True)
    }
    layouts = {new: layout_of(new, tensors) for new, tensors in ordered.items()}
    places = {name: place for one in layouts.values() for name, place in one.places.items()}
    single = in_single_threads([found.layers[rows[0].name].weight.numel for rows in groups])
    fits = [
        Fit(
            f"fit-{i:06}.json", tuple(found.layers[row.name] for row in rows), tuple(rows),
            plan.decomposers[rows[0].method or ""], rows[0].name in drafted,
            {name: places[name] for name in described[rows[0].name]}, single[i],
        )
        for i, rows in enumerate(groups)
    ]  # fmt: skip
    rewrites = [
        Rewrite(f"rewrite-{i:06}.json", values, places[name])
        for i, (name, values) in enumerate(moved.items())
    ]
    return Work(layouts, fits, list(_copies(source, gone, places)), rewrites)


def _moved(plan: Plan, found: FolderLayers) -> Iterator[tuple[str, Values]]:
    """By their new names the parameters that stay, in modules that are open for other chains."""
    opened = {found.opened.get(row.name) for row in plan if row.method is not None} - {None}
    for row in plan:
        if row.method is None and found.opened.get(row.name) in opened and row.layer is not None:
            layer = found.layers[row.name]
            yield f"{row.name}.weight", layer.weight
            if layer.bias is not None:
                yield f"{row.name}.bias", layer.bias


def _new_tensors(rows: Sequence[Row], plan: Plan, found: FolderLayers) -> dict[str, _Described]:
    """By their names the tensors of the chains, each where it is met first."""
    chains = []
    for row in rows:
        assert row.layer is not None
        assert row.method is not None
        assert row.rank is not None
        method, dtype = plan.decomposers[row.method], found.layers[row.name].weight.dtype
        chains.append(empty_chain(method, row.layer, row.rank, torch.device("meta"), dtype))
    if len(chains) > 1:
        chains = tied_chains(chains)
    tensors: dict[str, _Described] = {}
    seen: set[int] = set()
    # In the order of the model, as where a state dict is saved, whatever they are fitted as.
    order = {row.name: at for at, row in enumerate(plan)}
    for row, chain in sorted(zip(rows, chains, strict=True), key=lambda pair: order[pair[0].name]):
        named = [*chain.named_parameters(remove_duplicate=False), *chain.named_buffers()]
        for part, value in named:
            if id(value) not in seen:
                seen.add(id(value))
                nbytes = value.numel() * value.element_size()
                tensors[f"{row.name}.{part}"] = name_of(value.dtype), tuple(value.shape), nbytes
    return tensors


def _shard_names(count: int, *, single: bool) -> list[str]:
    if single:
        return [SINGLE][:count]
    return [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def _width(described: _Described) -> int:
    """The bytes of one entry."""
    _, shape, nbytes = described
    entries = 1
    for size in shape:
        entries *= size
    return nbytes // entries if entries else 0


def _copies(source: Source, gone: set[str], places: Mapping[str, Stored]) -> Iterator[Copy]:
    """Jobs that copy what stays, some bytes at a time."""
    runs: dict[tuple[str, str], list[tuple[int, int, int]]] = defaultdict(list)
    for name, stored in source.tensors.items():
        if name not in gone:
            place = places[name]
            for done in range(0, stored.nbytes, _COPIED_AT_ONCE):
                length = min(_COPIED_AT_ONCE, stored.nbytes - done)
                runs[stored.file, place.file].append(
                    (stored.begin + done, place.begin + done, length)
                )
    number = 0
    for (old, new), listed in runs.items():
        batch: list[tuple[int, int, int]] = []
        for run in [*listed, None]:
            size = sum(length for *_, length in batch)
            if batch and (run is None or size + run[2] > _COPIED_AT_ONCE):
                yield Copy(f"copy-{number:06}.json", old, new, tuple(batch))
                number, batch = number + 1, []
            if run is not None:
                batch.append(run)


def index_of(work: Work) -> dict[str, Any]:
    """What an index says of the files."""
    places = {n: file for file, layout in work.layouts.items() for n in layout.places}
    total = sum(p.nbytes for layout in work.layouts.values() for p in layout.places.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def write_index(target: Path, work: Work) -> None:
    """Write the index, where there is more than one file."""
    if list(work.layouts) != [SINGLE]:
        write_json(target / INDEX, index_of(work))


def check_room(work: Work, work_folder: WorkFolder) -> None:
    """Refuse, before anything is written, a disk that has too little room."""
    there = sum(f.stat().st_blocks * 512 for f in work_folder.files.glob("*") if f.is_file())
    needed, free = work.nbytes - there, shutil.disk_usage(work_folder.path).free
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
