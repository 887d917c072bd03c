"""All that a stream has to do once there is a plan: what is fitted, copied, and where it goes."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from tdecomp.decomposers.assemble import empty_chain
from tdecomp.decomposers.tied import tied_chains
from tdecomp.files.index import shard_names
from tdecomp.files.shards import Layout, Stored, layout_of, name_of
from tdecomp.plans.plan import Plan
from tdecomp.plans.row import Row
from tdecomp.plans.rows import row_groups
from tdecomp.runtime.parallel import in_single_threads
from tdecomp.streaming.jobs import Copy, Fit, Rewrite
from tdecomp.streaming.layers import FolderLayers, Values
from tdecomp.streaming.source import Source

_COPIED_AT_ONCE = 2**28  # bytes of a file that are copied by one job

# What a new tensor is, before it has a place: its dtype, its shape, its bytes.
_Described = tuple[str, tuple[int, ...], int]


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
    whole = source.written_name
    names = [whole][: len(files)] if len(source.shards) == 1 else shard_names(whole, len(files))
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
        saved = chain.state_dict().keys()
        for part, value in named:
            if id(value) not in seen and part in saved:
                seen.add(id(value))
                nbytes = value.numel() * value.element_size()
                tensors[f"{row.name}.{part}"] = name_of(value.dtype), tuple(value.shape), nbytes
    return tensors


def _width(described: _Described) -> int:
    """The bytes of one entry."""
    _, shape, nbytes = described
    return nbytes // (prod(shape) or 1)


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
