"""What a file or a folder holds, told from its headers, without reading the weights."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tdecomp.checkpoint.description import CONFIG, KEY, is_description, plan_in
from tdecomp.files.index import INDEX_SUFFIX
from tdecomp.files.shards import Stored, read_header
from tdecomp.files.typed import parsed, typed
from tdecomp.files.whole_file import named_in_errors
from tdecomp.layers.cost import count_in_words
from tdecomp.loss_curves.columns import filled_columns
from tdecomp.plans.plan import Plan
from tdecomp.plans.report import Report
from tdecomp.plans.table import FORMAT, Table
from tdecomp.streaming.job import REPORT, report_in
from tdecomp.streaming.source import PICKLED, config_in, open_folder
from tdecomp.streaming.target import WorkFolder

# The metadata under which `Decomposition.save` and `Moments.save` keep what is no tensor.
_SAVED, _MOMENTS = "tdecomp", "tdecomp_moments"


@dataclass(frozen=True)
class Contents:
    """What a file or a folder holds; as a text, everything that there is to say of it."""

    title: str  # what it is, in words
    plan: Plan | None = None  # of what was decomposed
    tensors: Mapping[str, Stored] = field(default_factory=dict)
    report: Report | None = None  # of the stream that wrote it

    def __str__(self) -> str:
        parts = [self.title]
        table = self.plan if self.report is None else self.report
        if table is not None:
            parts.append(str(table))
        if self.tensors:
            parts += [] if table is not None else [_shapes(self.tensors)]
            parts.append(_sizes(self.tensors))
        return "\n\n".join(parts)


def contents_of(path: str | os.PathLike[str]) -> Contents:
    """What there is at a path.

    >>> from tdecomp.streaming.command.show import contents_of
    >>> result = tdecomp.decompose(nn.Linear(64, 64), "svd", rank=8, progress=False)
    >>> result.save("small.safetensors")
    >>> found = contents_of("small.safetensors")
    >>> found.plan[""].rank, found.tensors["0.weight"].shape
    (8, (8, 64))

    A FileNotFoundError is raised if there is nothing, a ValueError that names the file if it is
    damaged or of a kind that is not read.
    """
    place = Path(path)
    if place.is_dir():
        return _folder(place)
    if not place.exists():
        raise FileNotFoundError(f"no such file or folder: {place}")
    if place.suffix == ".json":
        if place.name in (CONFIG, REPORT) or place.name.endswith(INDEX_SUFFIX):
            raise ValueError(
                f"{place}: a part of a folder, and no plan; expected the folder: `tdecomp show "
                f"{place.parent}` says what is in it"
            )
        with named_in_errors(place):
            plan = Plan.from_dict(parsed(place.read_bytes(), "plan", FORMAT))
        return Contents(f"{place}: a plan", plan)
    if place.suffix in PICKLED:
        raise ValueError(
            f"{place}: a pickled file runs code when it is read; expected safetensors: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), TARGET) converts it"
        )
    header, tensors = read_header(place.parent, place.name)
    with named_in_errors(place):
        said = json.loads(header).get("__metadata__") or {}
        metadata: dict[str, str] = typed(dict[str, str], said, "metadata")
        if _SAVED in metadata:
            saved = parsed(metadata[_SAVED], "decomposition", FORMAT)
            plan = Plan.from_dict(typed(dict[str, Any], saved.get("plan"), "plan"))
            return Contents(_title(place, saved), plan, tensors)
    if _MOMENTS in metadata:
        return Contents(f"{place}: moments, which tdecomp.Moments.load reads", None, tensors)
    if is_description(config_in(place.parent).get(KEY)):
        words = f"one file of a decomposed folder, `tdecomp show {place.parent}` shows its plan"
        return Contents(f"{place}: {words}", None, tensors)
    return Contents(f"{place}: an ordinary checkpoint, nothing is decomposed", None, tensors)


def _folder(place: Path) -> Contents:
    begun = WorkFolder(place)
    if begun.job() is not None:
        known = begun.plan()
        words = "a stream that is not finished, the same command goes on with it"
        return Contents(f"{place}: {words}", known and known[0])
    source = open_folder(place)
    if is_description(source.config.get(KEY)):
        with named_in_errors(place / CONFIG):
            plan = plan_in(source.config[KEY])
        with named_in_errors(place / REPORT):
            report = report_in(place)
        if report is not None and _choices(report) != _choices(plan):
            report = None  # what was done afterwards made another model of it
        title = _title(place, source.config[KEY])
        return Contents(title, plan, source.tensors, report)
    made_for = source.config.get("architectures") or [source.config.get("model_type")]
    words = f" of {', '.join(map(str, made_for))}" if any(made_for) else ""
    title = f"{place}: an ordinary checkpoint{words}, nothing is decomposed"
    return Contents(title, None, source.tensors)


def _choices(table: Table) -> list[tuple[Any, ...]]:
    return [(row.name, row.method, row.rank) for row in table]


def _title(place: Path, header: Mapping[str, Any]) -> str:
    return f"{place}: decomposed by tdecomp {header.get('version')}"


# A number that stands alone in a name, such as that of a block.
_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")


def _shapes(tensors: Mapping[str, Stored]) -> str:
    """The weights of two or more dimensions as a table; those alike but for numbers are a line."""
    groups: dict[tuple[str, tuple[int, ...], str], list[str]] = {}
    for name, tensor in tensors.items():
        if len(tensor.shape) > 1:
            key = _NUMBER.sub("*", name), tensor.shape, tensor.dtype
            groups.setdefault(key, []).append(name)
    lines = [
        [
            pattern if len(names) > 1 else names[0],
            " × ".join(map(str, shape)),
            dtype,
            f"{len(names)}",
            count_in_words(sum(tensors[name].numel for name in names)),
        ]
        for (pattern, shape, dtype), names in groups.items()
    ]
    headers = ["weight", "shape", "type", "layers", "values"]
    return filled_columns(headers, lines, right=headers[3:], style="simple")


def _sizes(tensors: Mapping[str, Stored]) -> str:
    """How much there is of each type, and of all together."""
    types = sorted({tensor.dtype for tensor in tensors.values()})
    lines = [_line(t, [x for x in tensors.values() if x.dtype == t]) for t in types]
    files = len({tensor.file for tensor in tensors.values()})
    where = f"all, in {files} file{'s' * (files > 1)}"
    headers = ["type", "tensors", "values", "on disk"]
    body = [*lines, _line(where, tensors.values())]
    return filled_columns(headers, body, right=headers[1:], style="simple")


def _line(title: str, tensors: Iterable[Stored]) -> list[str]:
    listed = list(tensors)
    numel, nbytes = (sum(getattr(t, name) for t in listed) for name in ("numel", "nbytes"))
    return [title, f"{len(listed):,}", count_in_words(numel), bytes_in_words(nbytes)]


def bytes_in_words(nbytes: int) -> str:
    """Three significant digits with a unit of powers of 1,000.

    >>> from tdecomp.streaming.command.show import bytes_in_words
    >>> bytes_in_words(2_200_000_000), bytes_in_words(12)
    ('2.20 GB', '12 B')
    """
    words = count_in_words(nbytes)
    return f"{words[:-1]} {words[-1]}B" if words[-1].isalpha() else f"{words} B"
