"""A folder of weights decomposed into another one, layer by layer."""

import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tdecomp.checkpoint.description import (
    CONFIG,
    KEY,
    description,
    readme,
    write_readme,
)
from tdecomp.decomposers.registry import Methods
from tdecomp.files.json_file import write_json
from tdecomp.files.whole_file import whole_file
from tdecomp.layers.cost import count_in_words
from tdecomp.model.filters import Filters
from tdecomp.plans.data_notes import data_notes
from tdecomp.plans.plan import Plan
from tdecomp.plans.report import Report
from tdecomp.plans.row import Row
from tdecomp.runtime.executors import check_executor
from tdecomp.runtime.parallel import parallel_map
from tdecomp.runtime.progress import Progress
from tdecomp.runtime.torch_state import restoring
from tdecomp.streaming import jobs
from tdecomp.streaming.choose import asked_for, methods_of, plan_folder
from tdecomp.streaming.job import REPORT, finished_report, job_of, write_report
from tdecomp.streaming.jobs import Copy, Fit, Folders, Rewrite, memory_needed
from tdecomp.streaming.layers import FolderLayers, layers_of
from tdecomp.streaming.of_transformers import skeleton_of
from tdecomp.streaming.source import Source, folder_at, open_source
from tdecomp.streaming.target import (
    WorkFolder,
    check_room,
    said_if_full,
    write_index,
)
from tdecomp.streaming.work import Work, work_of


def stream(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    methods: Methods | Plan,
    *,
    rank: Any = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    device: str | torch.device | None = None,
    max_memory: int | None = None,
    executor: Executor | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Report:
    """Decompose a folder of weights into another one, with one layer in memory at a time.

    >>> import os
    >>> from pathlib import Path
    >>> from safetensors.torch import save_file
    >>> weights = {"up.weight": torch.randn(64, 32), "down.weight": torch.randn(32, 64)}
    >>> os.mkdir("large")
    >>> save_file(weights, "large/model.safetensors")
    >>> _ = Path("large/config.json").write_text('{"model_type": "mine"}')
    >>> report = stream("large", "small", "svd", rank=8, include=["up", "down"], progress=False)
    >>> report.before.params, report.after.params, sorted(os.listdir("small"))[1:]
    (4096, 1536, ['config.json', 'model.safetensors', 'tdecomp.json'])

    Tensors have the very bits that `tdecomp.decompose` gives in memory, with the same number of
    threads; what is not decomposed is copied as it is, with all other files. Stopped at any moment,
    the same call goes on where it was.

    Parameters
    ----------
    source : path
        A folder of `*.safetensors`, a single file or several with their index, and `config.json`.
        Where transformers is installed and knows the architecture, it says which tensors are layers
        and which of them share a weight; else matrices named ``*.weight`` that `include` names are
        taken for Linear layers.
    target : path
        A folder, made if it is not there. It is loaded as any other one after
        ``import tdecomp.integrations.transformers``, or by ``tdecomp.load(target, model)``.
    methods, rank, include, exclude
        As for `tdecomp.decompose`; of budgets only ``Budget(params=...)``, for which all layers are
        read twice. In place of methods a `tdecomp.Plan`, edited or not, says all of this.
    device : device, optional
        Where layers are fitted, such as "cuda"; by default on the processor.
    max_memory : int, optional
        The bytes that layers may take at a time, in each process.
    executor : concurrent.futures.Executor, optional
        Such as `tdecomp.decompose` takes. Its workers read and write the files themselves: they see
        both folders under these paths.
    resume : bool
        Whether to go on with a target that the same call began. With False there must be none.
    progress : bool
        Show bars.

    Returns
    -------
    Report
        What was done to each layer, with the errors of the weights; of a target that the same call
        finished before, read from there.

    Raises
    ------
    FileNotFoundError
        If the source, or a file that its index names, is missing.
    ValueError, TypeError
        For a source that is damaged, quantized, decomposed already or not known, for a target that
        another call made (says what differs), and as `tdecomp.decompose`.
    OSError
        If the disk is full: with what is needed. What is done stays there.
    """
    asked, filters = asked_for(methods, rank, Filters(include, exclude))
    check_executor(executor)
    bar = Progress(progress)
    into = folder_at(target, "target").absolute()
    _check_places(folder_at(source, "source"), into)
    given = open_source(source)
    unit = _device(device, executor)
    job = job_of(given, asked, filters, unit)
    work_folder = WorkFolder(into)
    if (finished := finished_report(into, job, resume=resume)) is not None:
        work_folder.remove()
        return finished
    with restoring(), work_folder.alone():
        with bar.step("look at the model"):
            found = layers_of(given, skeleton_of(given), filters)
        _check_memory(found, methods_of(asked), max_memory)
        folders = Folders(
            str(given.folder.absolute()), str(work_folder.files), str(work_folder.records),
            str(unit), max_memory, keep_threads=executor is not None,
        )  # fmt: skip
        with said_if_full(into, given.nbytes):
            work_folder.begin(job)
            known = work_folder.plan()
            if known is None:
                chosen = plan_folder(found, asked, folders, executor=executor, progress=bar)
                known = chosen.plan, chosen.drafted
                work_folder.keep_plan(*known)
        work = work_of(given, found, *known)
        others = sum((given.folder / name).stat().st_size for name in given.other_files())
        check_room(work.nbytes + others, work_folder)
        with said_if_full(into, work.nbytes + others):
            work_folder.lay_out(work.layouts)
            rows = _carry_out(work, folders, executor, bar)
            report = _report(known[0], rows)
            _finish(given, work_folder, work, known[0], report, job, found.architecture)
    return report


def _check_places(source: Path, target: Path) -> None:
    """Refuse a target within the source, or around it."""
    one, other = source.resolve(), target.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(
            f"target: {target} and the source {source} are one folder, or one is in the other; "
            "expected a folder of its own"
        )
    for folder in (target, *target.parents):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"target: {folder} is a file; expected a folder, or none")


def _device(given: str | torch.device | None, executor: Executor | None) -> torch.device:
    """The device to fit on; a ValueError if there is none here, and nobody else does the work."""
    try:
        device = torch.device("cpu" if given is None else given)
        if executor is None:
            torch.empty(1, device=device).cpu()
    except (AssertionError, RuntimeError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"device: expected one that torch can compute on here, such as 'cpu' or 'cuda', got "
            f"{given!r} ({str(error).partition(chr(10))[0]})"
        ) from error
    return device


def _check_memory(found: FolderLayers, methods: Sequence[Any], most: int | None) -> None:
    """Refuse a bound that a layer alone needs more than."""
    if most is None:
        return
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ValueError(f"max_memory: expected a number of bytes, at least 1, got {most!r}")
    for name, layer in found.layers.items():
        needed = memory_needed([layer], methods)
        if found.sites[name].reason is None and needed > most:
            raise ValueError(
                f"layer {name!r} ({layer.spec}): fitting it takes about {count_in_words(needed)}B, "
                f"max_memory is {count_in_words(most)}B; expected more, or the layer left alone "
                f"with exclude=[{name!r}]"
            )


def _carry_out(
    work: Work, folders: Folders, executor: Executor | None, progress: Progress
) -> dict[str, Row]:
    """Do what has not been done yet; the rows of all fits by their names."""
    records: dict[str, dict[str, Any]] = {}
    fits: list[Fit] = []
    for job in work.fits:
        if (record := jobs.known_record(folders, job.record)) is None:
            fits.append(job)
        else:
            records[job.record] = record
    given: list[Copy | Rewrite] = [*work.copies, *work.rewrites]
    others = [job for job in given if jobs.known_record(folders, job.record) is None]
    total = sum(job.nbytes for job in fits) + sum(job.nbytes for job in others)
    errors = [0.0]

    def size(job: Fit) -> int:
        return job.layers[0].weight.numel if folders.device == "cpu" or executor else 0

    def shared(job: Copy | Rewrite) -> int:
        return job.nbytes if executor else 0

    with progress.step("fit and copy", total, "B", work=total) as step:

        def copied(job: Copy | Rewrite, _: Any) -> None:
            step.advance(count=job.nbytes, work=job.nbytes)

        def fitted(job: Fit, record: dict[str, Any]) -> None:
            records[job.record] = record
            errors.append(record["rows"][0]["weight_error"] or 0.0)
            step.advance(f"error at most {max(errors):.3g}", count=job.nbytes, work=job.nbytes)

        parallel_map(
            partial(jobs.bring_over, folders), others, size=shared, done=copied, executor=executor
        )
        parallel_map(partial(jobs.fit, folders), fits, size=size, done=fitted, executor=executor)
    rows = [Row.from_dict(row) for job in work.fits for row in records[job.record]["rows"]]
    return {row.name: row for row in rows}


def _report(plan: Plan, fitted: Mapping[str, Row]) -> Report:
    rows = [fitted.get(row.name, row) for row in plan]
    return Report(rows, plan.everything_else, plan.decomposers, notes=data_notes(rows, None))


def _finish(
    source: Source, folder: WorkFolder, work: Work, plan: Plan, report: Report,
    job: Mapping[str, Any], architecture: str | None,
) -> None:  # fmt: skip
    """Put everything in its place: the config last, without which nothing can be loaded."""
    target = folder.target
    for draft in target.rglob(".*.draft"):  # of a run that was killed here
        draft.unlink()
    folder.move_out(work.layouts)
    write_index(target, work, source.written_name)
    for name in source.other_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if name != REPORT:
            with whole_file(target / name) as draft:  # also over one that may not be written
                shutil.copy2(source.folder / name, draft)
    config = dict(source.config)
    if any(row.method is not None for row in plan):
        config[KEY] = description(plan)
        write_readme(target, readme(*_maker(source.config, architecture)))
    write_report(target, report, job)
    write_json(target / CONFIG, config)
    folder.remove()


def _maker(config: Mapping[str, Any], architecture: str | None) -> tuple[str, str]:
    """The class of the model and the library that it comes from, as the README names them."""
    if architecture is not None:
        return architecture, "transformers"
    for name, library in (("_class_name", "diffusers"), ("architecture", "timm")):
        if name in config:
            return str(config[name]), library
    return str(next(iter(config.get("architectures") or ()), "Model")), ""
