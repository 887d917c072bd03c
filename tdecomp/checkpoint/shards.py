"""Writing weights for a model whose library does not."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from tdecomp.checkpoint.folder import BUFFERS
from tdecomp.checkpoint.tensors import alone, buffers_beside
from tdecomp.files.index import INDEX_SUFFIX, NAMES, shard_names
from tdecomp.files.json_file import write_json
from tdecomp.files.whole_file import whole_file

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_METADATA = {"format": "pt"}  # without which transformers refuses a file


def write_weights(folder: Path, model: nn.Module, most: int | str) -> None:
    """Write the state dict into files of at most so many bytes, with an index if several."""
    largest = _bytes(most)
    state = model.state_dict(keep_vars=True)
    named: dict[int, str] = {}
    for name, value in state.items():
        named.setdefault(id(value), name)  # what has several names is stored once
    tensors = {name: state[name].detach() for name in named.values()}
    folder.mkdir(parents=True, exist_ok=True)
    _write_shards(folder, _shards(tensors, largest))


def write_buffers(folder: Path, model: nn.Module) -> None:
    """Write the buffers that are in no state dict, if there are any."""
    found = buffers_beside(model, model.state_dict())
    if found:
        _write(folder / BUFFERS, found)
    else:
        (folder / BUFFERS).unlink(missing_ok=True)


@contextmanager
def replacing_weights(folder: Path) -> Iterator[None]:
    """Remove earlier weights that a library leaves beside those that it writes meanwhile.

    It may write shards beside a single file of an earlier model, and load the single file.
    """
    before = _written(folder)
    yield
    now = _written(folder)
    for name in NAMES:
        pair = [found for found in (name, f"{name}{INDEX_SUFFIX}") if found in now]
        new = [found for found in pair if now[found] != before.get(found)]
        if len(pair) == 2 and len(new) == 1:
            (folder / next(found for found in pair if found not in new)).unlink()


def _written(folder: Path) -> dict[str, tuple[int, int]]:
    """When each file was written, in nanoseconds, and its inode."""
    stats = {file.name: file.stat() for file in folder.iterdir()}
    return {name: (stat.st_mtime_ns, stat.st_ino) for name, stat in stats.items()}


def _shards(tensors: Mapping[str, Tensor], largest: int) -> list[dict[str, Tensor]]:
    """The tensors in their order, in groups of at most so many bytes, or of one tensor."""
    shards: list[dict[str, Tensor]] = []
    room = 0
    for name, tensor in tensors.items():
        if not shards or tensor.nbytes > room:
            shards.append({})
            room = largest
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def _write_shards(folder: Path, shards: list[dict[str, Tensor]]) -> None:
    stem = NAMES[0].removesuffix(".safetensors")
    count, index = len(shards), folder / f"{NAMES[0]}{INDEX_SUFFIX}"
    names = shard_names(NAMES[0], count) if count > 1 else NAMES[:count]
    files = dict(zip(names, shards, strict=True))
    for name, tensors in files.items():
        _write(folder / name, tensors)
    if count > 1:
        size = sum(tensor.nbytes for tensors in shards for tensor in tensors.values())
        where = {name: file for file, tensors in files.items() for name in tensors}
        content = {"metadata": {"total_size": size}, "weight_map": where}
        write_json(index, content)
    # Last: until then what was there before is whole.
    earlier = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    kept = {*files, index.name} if count > 1 else {*files}
    for file in folder.iterdir():
        if earlier.fullmatch(file.name) and file.name not in kept:
            file.unlink()


def _write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    with whole_file(file) as draft:
        save_file(alone(tensors), draft, metadata=_METADATA)


def _bytes(size: int | str) -> int:
    """A number of bytes, also as "5GB"."""
    found = re.fullmatch(r"(\d+)\s*([KMGT]B)?", str(size).upper())
    if isinstance(size, bool) or found is None or not int(found[1]):
        raise ValueError(f"max_shard_size: expected bytes, such as 10**9 or '5GB', got {size!r}")
    return int(found[1]) * _UNITS[found[2] or ""]
