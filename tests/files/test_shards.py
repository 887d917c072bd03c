"""Safetensors files by the byte are those that safetensors reads and writes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tdecomp.files.shards import (
    copy_bytes,
    layout_of,
    name_of,
    read_header,
    read_tensor,
    same_bytes,
    write_tensor,
)

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip


def tensors():
    found = {str(d): torch.arange(12).reshape(3, 4).to(d) for d in DTYPES}
    return {**found, "empty": torch.ones(0, 3), "scalar": torch.tensor(2.5)}


def test_they_are_read_as_they_were_written(tmp_path):
    save_file(tensors(), tmp_path / "a.safetensors", metadata={"format": "pt"})
    _, found = read_header(tmp_path, "a.safetensors")
    assert found.keys() == tensors().keys()
    for name, value in tensors().items():
        read = read_tensor(tmp_path, found[name])
        assert read.dtype == value.dtype
        assert read.shape == value.shape
        assert torch.equal(read.flatten().view(torch.uint8), value.flatten().view(torch.uint8))
        assert found[name].numel == value.numel()
        assert name_of(value.dtype) == found[name].dtype


def test_they_are_written_so_that_safetensors_reads_them(tmp_path):
    given = {"a": torch.randn(3, 4), "b": torch.randn(5, 2).T, "empty": torch.ones(0, 3)}
    file = Path(tmp_path, "a.safetensors")
    described = {
        name: (name_of(value.dtype), tuple(value.shape), value.nbytes)
        for name, value in given.items()
    }
    layout = layout_of("a.safetensors", described)
    with file.open("w+b") as opened:
        opened.write(layout.header)
        opened.truncate(layout.size)
        for name, value in reversed(given.items()):  # in any order
            write_tensor(opened, layout.places[name], value)
    read = load_file(file)
    assert all(torch.equal(read[name], value) for name, value in given.items())
    with file.open("r+b") as opened, pytest.raises(ValueError, match="expected F32 of"):
        write_tensor(opened, layout.places["a"], torch.ones(4, 3))


def test_bytes_are_copied_and_compared(tmp_path):
    save_file({"a": torch.randn(9), "b": torch.ones(9)}, tmp_path / "a.safetensors")
    _, found = read_header(tmp_path, "a.safetensors")
    (tmp_path / "b").write_bytes(bytes(100))
    run = (found["b"].begin, 60, found["b"].nbytes)
    with (tmp_path / "a.safetensors").open("rb") as one, (tmp_path / "b").open("r+b") as other:
        copy_bytes(one, other, [run])
        with pytest.raises(ValueError, match="became shorter"):
            copy_bytes(one, other, [(found["b"].begin, 0, 10_000)])
    copied = (tmp_path / "b").read_bytes()
    assert copied[60:96] == torch.ones(9).numpy().tobytes()
    assert same_bytes(tmp_path, found["a"], found["a"])
    assert not same_bytes(tmp_path, found["a"], found["b"])


def test_a_header_that_is_nested_too_deeply_is_damaged(tmp_path):
    text = b"[" * 10**5
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        read_header(tmp_path, "a.safetensors")
