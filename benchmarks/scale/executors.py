"""The same work in turn, on threads, on spawned processes and on Dask's workers."""

import multiprocessing
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

import tdecomp
from benchmarks.scale.checkpoint import TINY, LlamaSizes, make_llama
from benchmarks.scale.row import ScaleRow
from benchmarks.support.pairs import spread

_ROUNDS = 5
_OF_DASK = ("one worker of Dask", "two workers of Dask")
_LEAST = 1.5


@dataclass(frozen=True)
class Way:
    """Where the work is done: on so many threads of this process, or on an executor."""

    threads: int = 1
    executor: Executor | None = None


@dataclass(frozen=True)
class Task:
    """What is done, on an executor or None."""

    do: Callable[[Executor | None], object]
    least: float | None = None  # times faster, two of Dask's workers against one
    only: tuple[str, ...] = ()  # of the ways; empty for all

    def run(self, way: Way) -> float:
        """The seconds it takes this way."""
        before = torch.get_num_threads()
        torch.set_num_threads(way.threads)
        try:
            began = time.perf_counter()
            self.do(way.executor)
            return time.perf_counter() - began
        finally:
            torch.set_num_threads(before)


def run(options: Namespace) -> list[ScaleRow]:
    """Every task each way, in turns; how many times faster than in turn."""
    rows: list[ScaleRow] = []
    with ways() as all_ways:
        for name, task in tasks(options).items():
            some = {way: all_ways[way] for way in task.only or all_ways}
            seconds = in_rounds(task, some, 1 if options.quick else _ROUNDS)
            rows += rows_of(name, seconds, task.least)
    return rows


@contextmanager
def ways() -> Iterator[dict[str, Way]]:
    """Each with its workers started; those of other processes have one thread of torch each."""
    distributed: Any = import_module("distributed")
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pool = ProcessPoolExecutor(2, spawn, torch.set_num_threads, (1,))
        found = {
            "one thread": Way(),
            "two threads": Way(2),
            "two spawned processes": Way(executor=stack.enter_context(pool)),
        }
        for workers, name in enumerate(_OF_DASK, start=1):
            cluster = stack.enter_context(
                distributed.LocalCluster(
                    n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=":0"
                )
            )
            client = stack.enter_context(distributed.Client(cluster, set_as_default=False))
            found[name] = Way(executor=client.get_executor())
        small = Task(_decompose(_linears(16, 16, 4)))
        for way in found.values():
            small.run(way)  # which imports torch in every worker
        yield found


def tasks(options: Namespace) -> dict[str, Task]:
    """By what they are: large layers in memory and in files, to data, and many small layers."""
    torch.manual_seed(0)
    quick = options.quick
    width, blocks = (32, 2) if quick else (1024, 12)
    large, narrow = _linears(width, 4 * width, blocks), _linears(width // 2, 2 * width, blocks // 2)
    inputs = torch.randn(4 * width, width // 2) @ torch.randn(width // 2, width // 2)
    data = tdecomp.calibrate(narrow, [inputs], gradients=False, progress=False)
    small = _linears(48, 48, 8 if quick else 200)
    sizes = TINY if quick else LlamaSizes(vocabulary=2_000, blocks=2, shards=2)
    of_llama = f"stream, {sizes.blocks} blocks of a Llama of {sizes.hidden:,}"
    return {
        of_llama: Task(_stream(options.folder, sizes), _LEAST, ("one thread", *_OF_DASK)),
        f"{_named(large)}, svd by their weights": Task(_decompose(large)),
        f"{_named(narrow)}, svd to moments": Task(_decompose(narrow, data=data)),
        f"{_named(small)}, svd by their weights": Task(_decompose(small)),
    }


def _decompose(model: nn.Module, **options: Any) -> Callable[[Executor | None], object]:
    return partial(_decomposed, model, options)


def _decomposed(model: nn.Module, options: Mapping[str, Any], executor: Executor | None) -> None:
    tdecomp.decompose(model, "svd", rank=0.4, **options, progress=False, executor=executor)


def _stream(folder: Path, sizes: LlamaSizes) -> Callable[[Executor | None], object]:
    """The stream of a checkpoint whose layers are named, which spares looking at a model."""
    source = make_llama(folder / f"llama-{sizes.blocks}", sizes)
    (source / "config.json").write_text('{"model_type": "layers"}')
    return partial(_streamed, source)


def _streamed(source: Path, executor: Executor | None) -> None:
    with TemporaryDirectory(dir=source.parent) as target:
        tdecomp.stream(
            source, Path(target, "small"), "svd", rank=tdecomp.Ratio(0.6, of="params"),
            include="*_proj", executor=executor, progress=False,
        )  # fmt: skip


def _named(model: nn.Sequential) -> str:
    first = model[0]
    assert isinstance(first, nn.Linear)
    return f"{len(model)} Linears of {first.in_features:,}×{first.out_features:,}"


def _linears(width: int, inner: int, count: int) -> nn.Sequential:
    sizes = [(width, inner) if i % 2 == 0 else (inner, width) for i in range(count)]
    return nn.Sequential(*(nn.Linear(*size) for size in sizes))


def in_rounds(task: Task, all_ways: Mapping[str, Way], rounds: int) -> dict[str, list[float]]:
    """The seconds of every way, round by round; every other round goes backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in all_ways}
    for number in range(rounds):
        order = list(all_ways) if number % 2 == 0 else list(all_ways)[::-1]
        for name in order:
            seconds[name].append(task.run(all_ways[name]))
    return seconds


def rows_of(task: str, seconds: Mapping[str, list[float]], least: float | None) -> list[ScaleRow]:
    """The lines of one task: each way beside one thread, and two of Dask's workers beside one."""
    first, *others = seconds
    rows = [ScaleRow(f"{task}: {first}", "", f"{spread(seconds[first], 2)} s")]
    for name in others:
        ratios = _times_faster(seconds[first], seconds[name])
        measured = f"{spread(seconds[name], 2)} s, {spread(ratios, 2)} times faster"
        rows.append(ScaleRow(f"{task}: {name}", "", measured))
    one, two = (seconds[way] for way in _OF_DASK)
    ratios = _times_faster(one, two)
    within = None if least is None else statistics.median(ratios) >= least
    bound = "" if least is None else f"≥ {least} times faster"
    what, measured = f"{task}: two workers of Dask beside one", f"{spread(ratios, 2)} times faster"
    return [*rows, ScaleRow(what, bound, measured, within)]


def _times_faster(slow: list[float], fast: list[float]) -> list[float]:
    return [a / b for a, b in zip(slow, fast, strict=True)]
