"""The weights in a folder: safetensors files, with an index where there are several."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tdecomp.files.index import INDEX_SUFFIX, NAMES, read_index
from tdecomp.files.shards import ANEW, DAMAGED, read_header
from tdecomp.runtime.scope import interrupts_deferred

BUFFERS = "buffers_without_state.safetensors"  # what no state dict has, such as rotary frequencies


def weight_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor in a folder, all of them there and as the index says.

    Raises what `read_index` raises, and a ValueError for a folder with no weights or with those of
    two models.
    """
    for name in NAMES:
        if (folder / name).is_file():
            refuse_shards_beside(folder / name)
            return dict.fromkeys(names_in(folder / name), folder / name)
        index = folder / f"{name}{INDEX_SUFFIX}"
        if index.is_file():
            return indexed_files(index)
    raise ValueError(
        f"{folder} has no weights; expected {' or '.join(NAMES)}, or shards with an index; those "
        "of a variant, and other formats, are for from_pretrained"
    )


def refuse_shards_beside(single: Path) -> None:
    """Raise a ValueError if there are shards, too: one or the other is of an earlier model."""
    index = single.with_name(f"{single.name}{INDEX_SUFFIX}")
    if not index.is_file():
        return
    try:
        indexed_files(index)
    except (ValueError, FileNotFoundError):  # libraries remove shards, and leave their index
        return
    raise ValueError(
        f"{single.parent} has weights in {single.name} and in the shards of {index.name}, as where "
        "one model was saved over another; remove those that are older"
    )


def indexed_files(index: Path) -> dict[str, Path]:
    """The file of each tensor by an index, as `weight_files`."""
    return {name: index.parent / its.file for name, its in read_index(index).tensors.items()}


def names_in(file: Path) -> list[str]:
    """The names of a safetensors file's tensors, of which only the header is read."""
    return [*read_header(file.parent, file.name)[1]]


def read_weights(files: Mapping[str, Path]) -> dict[str, Tensor]:
    """The tensors of these names from these files."""
    tensors: dict[str, Tensor] = {}
    for file in sorted({*files.values()}):
        try:
            with safe_open(file, framework="pt") as content:
                for name in (name for name, its in files.items() if its == file):
                    with interrupts_deferred():  # which safetensors may take for damage
                        # A copy, since the file is mapped and may change later.
                        tensors[name] = content.get_tensor(name).clone()
        except SafetensorError as error:
            raise ValueError(f"{file}: {DAMAGED} ({error}); {ANEW}") from error
    return tensors
