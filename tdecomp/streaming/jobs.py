"""What workers do: plain data in, files written, plain data out.

A job reads the tensors of its layers itself and writes its results itself, last of all a record
that says so. Done twice, it writes the same again.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdecomp.calibration.memory import freed_at_once
from tdecomp.decomposers.base import Decomposer
from tdecomp.files.json_file import read_json, write_json
from tdecomp.files.shards import Stored, copy_bytes, write_tensor
from tdecomp.loss_curves.curve import layer_curves
from tdecomp.loss_curves.offers import layer_losses, offers_of
from tdecomp.model.sites import Site, check_weight
from tdecomp.plans.fit import Group, fit_rows
from tdecomp.plans.row import Row
from tdecomp.ranks.base import RankSelector
from tdecomp.ranks.grid import Rounding
from tdecomp.runtime.parallel import OneThread
from tdecomp.streaming.known import facts_to_dict
from tdecomp.streaming.layers import FileLayer, Values, read_group
from tdecomp.streaming.room import MemoryRoom

# Beside the weights as they are stored: the matrix in the precision of a fit, its scaled copy, the
# factors and their product, and what LAPACK works in.
_COPIES = 4


@dataclass(frozen=True)
class Folders:
    """Where jobs read and write, and what they may use."""

    source: str
    target: str = ""  # of the files that are in the making
    records: str | None = None  # of what is done, if it is to be known to later runs
    device: str = "cpu"
    max_memory: int | None = None  # bytes that all jobs of a process together may take
    keep_threads: bool = False  # whether jobs run with as many threads as torch has there


@dataclass(frozen=True)
class Question:
    """What is to be known of the layers that share one weight, before ranks are chosen."""

    record: str
    layers: tuple[FileLayer, ...]
    fitted_as: int  # the place of the layer that stands for all
    methods: tuple[Decomposer, ...]  # that can take them
    selector: RankSelector
    rounding: Rounding
    expect: bool  # whether the errors to expect are asked for, too
    one_thread: bool


@dataclass(frozen=True)
class Fit:
    """Layers that share one weight, to be fitted and written."""

    record: str
    layers: tuple[FileLayer, ...]  # in the order of the rows, first the one that they are fitted as
    rows: tuple[Row, ...]
    method: Decomposer
    drafted: bool  # whether a draft of this very rank was made to choose it: the fit starts there
    places: Mapping[str, Stored]  # by the names of new tensors where they are written
    one_thread: bool

    @property
    def nbytes(self) -> int:
        """That are read."""
        biases = sum(layer.bias.nbytes for layer in self.layers if layer.bias is not None)
        return self.layers[0].weight.nbytes + biases


@dataclass(frozen=True)
class Copy:
    """Bytes of one file that are copied as they are."""

    record: str
    source: str
    target: str
    runs: tuple[tuple[int, int, int], ...]  # where each begins in both files, and its length

    @property
    def nbytes(self) -> int:
        """That are copied."""
        return sum(length for *_, length in self.runs)


@dataclass(frozen=True)
class Rewrite:
    """A parameter that stays, written in the form that its module has once that is open."""

    record: str
    values: Values
    place: Stored

    @property
    def nbytes(self) -> int:
        """That are read."""
        return self.values.nbytes


def facts(folders: Folders, question: Question) -> dict[str, Any]:
    """What the selector asks of these layers, also written as a record."""
    with ExitStack() as inside:
        sites = _prepare(inside, folders, question.layers, question.methods, question.one_thread)
        site = sites[question.fitted_as]
        check_weight(site)
        (losses,) = layer_losses([site], None)
        curves, selector = {}, question.selector
        if selector.weighs_layers:
            curves = layer_curves(losses, question.methods, rounding=question.rounding)
        (offer,) = offers_of([(site, question.methods)], [losses], [curves])
        if selector.weighs_layers:
            for candidate in offer.candidates:
                candidate.best_ranks()
        else:
            with suppress(Exception):  # whoever asks for all layers says what is wrong
                selector.select([offer.candidates])
        if question.expect:
            for method in question.methods:
                losses.expected_error(method, method.max_rank(losses.spec))
        found = facts_to_dict(losses.cache.since(0), curves)
        return _recorded(folders, question.record, {"layer": site.name, **found})


def fit(folders: Folders, job: Fit) -> dict[str, Any]:
    """Fit the layers, write their chains' tensors, and return their rows."""
    with ExitStack() as inside:
        sites = _prepare(inside, folders, job.layers, [job.method], job.one_thread)
        check_weight(sites[0])
        draft = None
        if job.drafted:
            (losses,) = layer_losses(sites[:1], None)
            rank = job.rows[0].rank
            assert rank is not None
            draft = losses.fit(job.method, rank, draft=True)
        found = fit_rows(Group(sites, job.rows, job.method, draft=draft))
        del sites, draft
        left = dict(job.places)
        for row, chain in found:
            _write_chain(folders, row.name, chain, left)
        _synced(folders, job.places.values())
        assert not left, f"{row.name}: no values for {', '.join(left)}"
        return _recorded(folders, job.record, {"rows": [row.to_dict() for row, _ in found]})


def bring_over(folders: Folders, job: Copy | Rewrite) -> dict[str, Any]:
    """Copy what no chain takes the place of, as it is or in another form."""
    return _copy(folders, job) if isinstance(job, Copy) else _rewrite(folders, job)


def _copy(folders: Folders, job: Copy) -> dict[str, Any]:
    source, target = Path(folders.source, job.source), Path(folders.target, job.target)
    with source.open("rb") as reading, target.open("r+b") as writing:
        copy_bytes(reading, writing, job.runs)
        writing.flush()
        os.fsync(writing.fileno())
    return _recorded(folders, job.record, {})


def _rewrite(folders: Folders, job: Rewrite) -> dict[str, Any]:
    with ExitStack() as inside:
        if folders.max_memory is not None:
            room = MemoryRoom.of(folders.target)
            inside.enter_context(room.held(2 * job.nbytes, folders.max_memory))
        with Path(folders.target, job.place.file).open("r+b") as opened:
            write_tensor(opened, job.place, job.values.read(folders.source))
        _synced(folders, [job.place])
    return _recorded(folders, job.record, {})


def known_record(folders: Folders, record: str) -> dict[str, Any] | None:
    """What a job returned that was done before; None if it was not, or not to its end."""
    if folders.records is None:
        return None
    found: dict[str, Any] | None = read_json(Path(folders.records, record))
    return found


def memory_needed(layers: Sequence[FileLayer], methods: Sequence[Decomposer]) -> int:
    """Bytes that reading and fitting these layers takes, about."""
    weight = layers[0].weight
    taking = [method for method in methods if method.refuses(layers[0].spec) is None]
    wide = weight.dtype.itemsize == 8 or any(method.fits_in_float64 for method in taking)
    stored = weight.nbytes * (2 if weight.stacked else 1) + 4 * weight.numel * weight.wide
    return stored + _COPIES * weight.numel * (8 if wide else 4)


def _prepare(
    inside: ExitStack,
    folders: Folders,
    layers: Sequence[FileLayer],
    methods: Sequence[Decomposer],
    one_thread: bool,
) -> list[Site]:
    """The sites with their values; `inside` is left when the job is done."""
    inside.enter_context(freed_at_once())
    inside.enter_context(torch.no_grad())
    if one_thread and not folders.keep_threads:
        inside.enter_context(OneThread())
    if folders.max_memory is not None:
        needed = memory_needed(layers, methods)
        inside.enter_context(MemoryRoom.of(folders.target).held(needed, folders.max_memory))
    return read_group(folders.source, layers, torch.device(folders.device))


def _write_chain(folders: Folders, name: str, chain: nn.Module, left: dict[str, Stored]) -> None:
    for part, values in chain.state_dict().items():
        place = left.pop(f"{name}.{part}", None)
        if place is not None:  # else an earlier chain of the group has it
            with Path(folders.target, place.file).open("r+b") as opened:
                write_tensor(opened, place, values)


def _synced(folders: Folders, places: Any) -> None:
    """After this not even a power cut takes away what was written there."""
    for file in sorted({place.file for place in places}):
        with Path(folders.target, file).open("r+b") as opened:
            os.fsync(opened.fileno())


def _recorded(folders: Folders, record: str, found: dict[str, Any]) -> dict[str, Any]:
    if folders.records is not None:
        write_json(Path(folders.records, record), found)
    return found
