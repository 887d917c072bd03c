"""Safetensors files by the byte: where each tensor lies, read and written one tensor at a time.

The format: 8 bytes with the length of a JSON header (little-endian), the header, and the tensors'
bytes one after the other, as the header's offsets say.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

# Torch's dtypes by the names that the files have for them; there are others.
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_LENGTH = 8
_LONGEST = 100_000_000  # bytes of a header, as in safetensors itself
_ALIGNED = 8
_CHUNK = 2**24  # bytes that are copied at a time
# What is wrong with a file, and what helps.
DAMAGED, ANEW = "damaged or no safetensors file", "copy or download it anew"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: str  # its name, within a folder
    dtype: str  # as the file names it, such as BF16
    shape: tuple[int, ...]
    begin: int  # of its bytes, from the beginning of the file
    nbytes: int

    @property
    def numel(self) -> int:
        """The number of entries."""
        return prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """Torch's dtype; None for those that it does not have."""
        return _TYPES.get(self.dtype)


def name_of(dtype: torch.dtype) -> str:
    """The name that files have for a dtype."""
    return next(name for name, known in _TYPES.items() if known == dtype)


def read_header(folder: str | os.PathLike[str], file: str) -> tuple[bytes, dict[str, Stored]]:
    """The header as it is stored, and by its name each tensor of a file.

    A ValueError that names the file where it is no safetensors file, or not whole.
    """
    path = Path(folder, file)
    size = path.stat().st_size
    with path.open("rb") as opened:
        length = int.from_bytes(opened.read(_LENGTH), "little")
        if size < _LENGTH or not 0 < length <= min(_LONGEST, size - _LENGTH):
            raise ValueError(f"{path}: {DAMAGED} (its header is cut off); {ANEW}")
        header = opened.read(length)
    begin = _LENGTH + length
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        found = {name: _stored(file, entry, begin) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: {DAMAGED} (no header: {error}); {ANEW}") from error
    end = max((entry.begin + entry.nbytes for entry in found.values()), default=begin)
    if end != size:
        raise ValueError(
            f"{path}: {DAMAGED}: by its header {end:,} bytes, the file has {size:,}; {ANEW}"
        )
    return header, found


def _stored(file: str, entry: Mapping[str, Any], begin: int) -> Stored:
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(size) is int and size >= 0 for size in (first, last - first, *shape)):
        raise ValueError(f"offsets {first}, {last} and shape {shape}")
    stored = Stored(file, str(entry["dtype"]), shape, begin + first, last - first)
    dtype = stored.torch_dtype
    if dtype is not None and dtype.itemsize * stored.numel != stored.nbytes:
        raise ValueError(f"{stored.dtype} of shape {shape} in {stored.nbytes} bytes")
    return stored


def read_tensor(folder: str | os.PathLike[str], stored: Stored) -> Tensor:
    """The values, in memory of their own: a mapped file would count as this process's, too."""
    dtype = stored.torch_dtype
    assert dtype is not None
    values = torch.empty(stored.shape, dtype=dtype, device="cpu")
    if stored.nbytes:
        with Path(folder, stored.file).open("rb", buffering=0) as opened:
            opened.seek(stored.begin)
            _read_into(opened, memoryview(_bytes_of(values)))
    return values


def _read_into(opened: Any, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        got = opened.readinto(buffer[done : done + _CHUNK])
        if not got:
            raise ValueError(f"{opened.name}: it became shorter while it was read; {ANEW}")
        done += got


def _bytes_of(values: Tensor) -> Any:
    # Contiguous tensors with one element may have any stride.
    flat = values.as_strided((values.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


@dataclass(frozen=True)
class Layout:
    """A file that is going to be written: its header, and where its tensors go."""

    header: bytes  # the length included
    places: Mapping[str, Stored]
    size: int  # of the whole file


def layout_of(file: str, tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> Layout:
    """The file with tensors of these dtypes, shapes and numbers of bytes, in their order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        entries[name] = {
            "dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes],
        }  # fmt: skip
        offset += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    header = len(text).to_bytes(_LENGTH, "little") + text
    places = {
        name: Stored(file, dtype, shape, len(header) + entries[name]["data_offsets"][0], nbytes)
        for name, (dtype, shape, nbytes) in tensors.items()
    }
    return Layout(header, places, len(header) + offset)


def write_tensor(opened: BinaryIO, place: Stored, values: Tensor) -> None:
    """Write values of this place's dtype and shape into an opened file."""
    whole = values.detach().cpu().contiguous()
    if (name_of(whole.dtype), tuple(whole.shape)) != (place.dtype, place.shape):
        got = f"{whole.dtype} of shape {tuple(whole.shape)}"
        raise ValueError(f"{place.file}: got {got}, expected {place.dtype} of {place.shape}")
    if place.nbytes:
        opened.seek(place.begin)
        buffer = memoryview(_bytes_of(whole))
        for done in range(0, len(buffer), _CHUNK):
            opened.write(buffer[done : done + _CHUNK])


def copy_bytes(source: BinaryIO, target: BinaryIO, runs: Iterable[tuple[int, int, int]]) -> None:
    """Copy runs of bytes: where each begins in the source and in the target, and its length."""
    for begin, place, length in runs:
        source.seek(begin)
        target.seek(place)
        left = length
        while left:
            chunk = source.read(min(_CHUNK, left))
            if not chunk:
                raise ValueError(f"{source.name}: it became shorter while it was read; {ANEW}")
            target.write(chunk)
            left -= len(chunk)


def same_bytes(folder: str | os.PathLike[str], one: Stored, other: Stored) -> bool:
    """Whether two tensors are the same, bit for bit."""
    if (one.dtype, one.shape, one.nbytes) != (other.dtype, other.shape, other.nbytes):
        return False
    with Path(folder, one.file).open("rb") as first, Path(folder, other.file).open("rb") as second:
        first.seek(one.begin)
        second.seek(other.begin)
        for done in range(0, one.nbytes, _CHUNK):
            length = min(_CHUNK, one.nbytes - done)
            if first.read(length) != second.read(length):
                return False
    return True
