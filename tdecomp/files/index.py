"""Weights in several files: their names, and the index that says where each tensor is."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdecomp.files.shards import ANEW, Stored, read_header
from tdecomp.files.typed import typed

# As transformers, and most others, name them, and as diffusers does; a single file comes first.
NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
INDEX_SUFFIX = ".index.json"  # what an index has after the name of a single file
_SHOWN = 3  # of the tensors about which an index and its shards disagree


def shard_names(whole: str, count: int) -> list[str]:
    """The names of so many files in the place of a whole one, as transformers gives them."""
    stem, suffix = whole.split(".")
    return [f"{stem}-{at:05}-of-{count:05}.{suffix}" for at in range(1, count + 1)]


@dataclass(frozen=True)
class Headers:
    """What the headers of one or several files say."""

    tensors: Mapping[str, Stored]  # by their names, in the order of the files
    texts: Mapping[str, bytes]  # the headers as they are stored, by the names of the files


def read_headers(folder: Path, files: Iterable[str]) -> Headers:
    """The headers of these files of a folder.

    A ValueError names a file that is damaged, or two that have a tensor of the same name.
    """
    tensors: dict[str, Stored] = {}
    texts: dict[str, bytes] = {}
    for file in files:
        texts[file], found = read_header(folder, file)
        if twice := tensors.keys() & found.keys():
            name = min(twice)
            raise ValueError(
                f"{folder / file}: it has the tensor {name!r}, which {tensors[name].file} has, "
                "too; expected the files of one model"
            )
        tensors |= found
    return Headers(tensors, texts)


def read_index(index: Path) -> Headers:
    """The headers of all files that an index names, which have the tensors that it says.

    A FileNotFoundError names files that are missing. A ValueError names a file that is damaged,
    the index included, or the tensors about which the index and the files disagree.
    """
    folder, said = index.parent, _weight_map(index)
    files = sorted({*said.values()})
    if outside := [file for file in files if Path(file).name != file]:
        raise ValueError(f"{index}: expected names of files beside it, got {', '.join(outside)}")
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise FileNotFoundError(
            f"{folder}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing, of "
            f"the {len(files)} files that {index.name} names; copy or download the folder anew"
        )
    headers = read_headers(folder, files)
    found = {name: stored.file for name, stored in headers.tensors.items()}
    wrong = sorted(name for name in {*said, *found} if said.get(name) != found.get(name))
    if wrong:
        words = [
            f"{name!r} in {said.get(name, 'no file')}, it is in {found.get(name, 'no file')}"
            for name in wrong[:_SHOWN]
        ]
        if len(wrong) > _SHOWN:
            words.append(f"and {len(wrong) - _SHOWN} more")
        raise ValueError(
            f"{index}: the index has {'; '.join(words)}. Expected the index of these files: copy "
            "or download all of them anew"
        )
    return headers


def _weight_map(index: Path) -> dict[str, str]:
    try:
        data: dict[str, Any] = typed(dict[str, Any], json.loads(index.read_bytes()), "index")
        said: dict[str, str] = typed(dict[str, str], data.get("weight_map"), "weight_map")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{index}: damaged: {error}; {ANEW}") from error
    return said
