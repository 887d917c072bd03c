"""Tensors with a header in one file: what comes back, and what the hash covers."""

import json
import random
import signal
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tdecomp.files.tensors import read_tensors, sealed, write_tensors
from tests.injections import Alarm

HEADER = {"format": 1, "words": "ß"}


def tensors():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, generator=generator)
    return {
        "matrix": values, "same shape": values + 1, "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3), "mask": torch.tensor([True, False]),
        "half": values.to(torch.bfloat16), "eighth": values.to(torch.float8_e4m3fn),
        "complex": torch.complex(values, values), "one": torch.ones(2)[::2],
    }  # fmt: skip


@pytest.fixture
def file(tmp_path):
    write_tensors(tmp_path / "file", "key", HEADER, tensors())
    return tmp_path / "file"


def test_what_was_written_comes_back(file):
    header, read = read_tensors(file, "key", "data", 1)
    assert header == HEADER
    for name, value in tensors().items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name].to(torch.complex64), value.to(torch.complex64))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="a system without timers")
def test_an_interrupt_is_no_damage(file):
    """Nor where safetensors has torch look into a storage, in which errors become others."""
    rng, interrupted = random.Random(0), 0
    start = time.perf_counter()
    read_tensors(file, "key", "data", 1)
    most = time.perf_counter() - start
    for _ in range(200):
        try:
            with Alarm(most * rng.random()):
                read_tensors(file, "key", "data", 1)
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted > 0


def test_files_of_the_same_are_the_same(file, tmp_path):
    for number in range(20):
        write_tensors(tmp_path / str(number), "key", HEADER, tensors())
        assert (tmp_path / str(number)).read_bytes() == file.read_bytes()


def test_every_bit_counts(file):
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for at in range(start, len(content)):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ValueError, match="SHA-256"):
            read_tensors(file, "key", "data", 1)


def swap(held):
    held["matrix"], held["same shape"] = held["same shape"], held["matrix"]


@pytest.mark.parametrize(
    "change",
    [
        swap,
        lambda held: held.update(matrix=held["matrix"].view(torch.int32)),
        lambda held: held.update(matrix=held["matrix"].view(3, 2)),
        lambda held: held.update(more=held.pop("matrix")),
        lambda held: held.pop("empty"),
    ],
    ids=["swapped", "dtype", "shape", "name", "lost"],
)
def test_names_shapes_and_dtypes_count(file, change):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    held = tensors()
    change(held)
    save_file(held, file, metadata)
    with pytest.raises(ValueError, match="SHA-256"):
        read_tensors(file, "key", "data", 1)
    save_file(held, file, {"key": sealed(HEADER, held)})
    assert read_tensors(file, "key", "data", 1)[1].keys() == held.keys()


def test_the_header_counts_and_a_hash_is_needed(file):
    for text in (sealed(HEADER, tensors()).replace("words", "sword"), json.dumps(HEADER)):
        save_file(tensors(), file, {"key": text})
        with pytest.raises(ValueError, match="SHA-256"):
            read_tensors(file, "key", "data", 1)


def test_a_later_format_is_named_whatever_its_hash(file):
    save_file(tensors(), file, {"key": '{"format": 2}'})
    with pytest.raises(ValueError, match=r"data format 2.*update"):
        read_tensors(file, "key", "data", 1)


def test_files_of_others(file, tmp_path):
    with pytest.raises(ValueError, match="no other"):
        read_tensors(file, "other", "other", 1)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            read_tensors(missing, "key", "data", 1)
