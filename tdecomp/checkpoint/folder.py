"""The weights in a folder: safetensors files, with an index where there are several."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tdecomp.files.typed import typed
from tdecomp.runtime.scope import interrupts_deferred

# As transformers, and most others, name them, and as diffusers does; a single file comes first.
NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
BUFFERS = "buffers_without_state.safetensors"  # what no state dict has, such as rotary frequencies


def shard_names(whole: str, count: int) -> list[str]:
    """The names of so many files in the place of a whole one, as transformers gives them."""
    stem, suffix = whole.split(".")
    return [f"{stem}-{at:05}-of-{count:05}.{suffix}" for at in range(1, count + 1)]


def weight_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor in a folder, all of them there and as the index says.

    A ValueError names files that are missing or damaged, and tensors that the index and the files
    do not agree about.
    """
    for name in NAMES:
        if (folder / name).is_file():
            refuse_shards_beside(folder / name)
            return dict.fromkeys(names_in(folder / name), folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return indexed_files(index)
    raise ValueError(
        f"{folder} has no weights; expected {' or '.join(NAMES)}, or shards with an index; those "
        "of a variant, and other formats, are for from_pretrained"
    )


def refuse_shards_beside(single: Path) -> None:
    """Raise a ValueError if there are shards, too: one or the other is of an earlier model."""
    index = single.with_name(f"{single.name}.index.json")
    if not index.is_file():
        return
    try:
        indexed_files(index)
    except ValueError:  # libraries leave an index where they have removed its shards
        return
    raise ValueError(
        f"{single.parent} has weights in {single.name} and in the shards of {index.name}, as where "
        "one model was saved over another; remove those that are older"
    )


def indexed_files(index: Path) -> dict[str, Path]:
    """The file of each tensor by an index, as `weight_files`."""
    folder = index.parent
    try:
        content = typed(dict[str, Any], json.loads(index.read_bytes()), "index")
        files = typed(dict[str, str], content.get("weight_map"), "weight_map")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is damaged: {error}") from error
    if outside := sorted(file for file in {*files.values()} if Path(file).name != file):
        raise ValueError(f"{index} names files outside of its folder: {', '.join(outside)}")
    shards = sorted({*files.values()})
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise ValueError(f"{folder}: missing shards that {index.name} names: {', '.join(missing)}")
    found = {shard: {*names_in(folder / shard)} for shard in shards}
    lost = [f"{name} in {file}" for name, file in files.items() if name not in found[file]]
    extra = [
        f"{name} in {file}" for file, held in found.items() for name in sorted(held)
        if files.get(name) != file
    ]  # fmt: skip
    if lost or extra:
        words = [("not there", lost), ("not in the index", extra)]
        listed = "; ".join(f"{what}: {', '.join(some)}" for what, some in words if some)
        raise ValueError(f"{index} disagrees with its shards, copy them anew. Tensors {listed}")
    return {name: folder / file for name, file in files.items()}


def names_in(file: Path) -> list[str]:
    """The names of a safetensors file's tensors, of which only the header is read."""
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    with _opened(file) as content:
        return [*content.keys()]


def read_weights(files: Mapping[str, Path]) -> dict[str, Tensor]:
    """The tensors of these names from these files."""
    tensors: dict[str, Tensor] = {}
    for file in sorted({*files.values()}):
        with _opened(file) as content:
            for name in (name for name, its in files.items() if its == file):
                with interrupts_deferred():  # which safetensors may take for damage
                    # A copy, since the file is mapped and may change later.
                    tensors[name] = content.get_tensor(name).clone()
    return tensors


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as content:
            yield content
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from error
