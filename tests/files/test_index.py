"""Indices: what they say is what the files have, or both are named."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tdecomp.files.index import NAMES, read_headers, read_index, shard_names

FILES = shard_names(NAMES[0], 3)
TENSORS = {FILES[at]: [f"{at}.weight", f"{at}.bias"] for at in range(3)}


@pytest.fixture
def index(tmp_path):
    """An index of three files with two tensors each."""
    for file, names in TENSORS.items():
        save_file({name: torch.ones(2, 3) for name in names}, tmp_path / file)
    path = tmp_path / f"{NAMES[0]}.index.json"
    write(path, {name: file for file, names in TENSORS.items() for name in names})
    return path


def write(index, places):
    index.write_text(json.dumps({"weight_map": places}))


def edit(index, **changes):
    """Let the index say something else of tensors; None lets it say nothing."""
    places = {**json.loads(index.read_text())["weight_map"], **changes}
    write(index, {name: file for name, file in places.items() if file is not None})


def test_names():
    assert FILES[1] == "model-00002-of-00003.safetensors"


def test_where_the_tensors_are(index):
    headers = read_index(index)
    assert {name: stored.file for name, stored in headers.tensors.items()} == {
        name: file for file, names in TENSORS.items() for name in names
    }
    assert list(headers.texts) == FILES
    for file, text in headers.texts.items():
        assert json.loads(text).keys() >= {*TENSORS[file]}
        assert text in (index.parent / file).read_bytes()


@pytest.mark.parametrize("gone, words", [(FILES[1:2], "is"), (FILES[1:], "are")])
def test_missing_files_are_named(index, gone, words):
    for file in gone:
        (index.parent / file).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        read_index(index)
    assert f"{', '.join(gone)} {words} missing, of the 3 files that {index.name} names" in str(
        caught.value
    )


@pytest.mark.parametrize("size", [0, 5, 60, -1])
def test_a_truncated_file_is_named(index, size):
    file = index.parent / FILES[2]
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"damaged or no safetensors file.*anew") as caught:
        read_index(index)
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"0.bias": FILES[2]}, f"'0.bias' in {FILES[2]}, it is in {FILES[0]}."),
        ({"0.bias": None}, f"'0.bias' in no file, it is in {FILES[0]}."),
        ({"ghost": FILES[1]}, f"'ghost' in {FILES[1]}, it is in no file."),
        (
            {"0.bias": None, "ghost": FILES[1]},
            f"'0.bias' in no file, it is in {FILES[0]}; 'ghost' in {FILES[1]}, it is in no file.",
        ),
        (dict.fromkeys("abcde", FILES[0]), f"'c' in {FILES[0]}, it is in no file; and 2 more."),
    ],
)
def test_an_index_that_disagrees_names_the_tensors_and_both_files(index, changes, words):
    edit(index, **changes)
    with pytest.raises(ValueError, match="copy or download all of them anew") as caught:
        read_index(index)
    assert str(caught.value).startswith(f"{index}: the index has ")
    assert words in str(caught.value)


def test_a_tensor_in_two_files(index):
    save_file({"0.bias": torch.ones(2, 3), "1.bias": torch.ones(2)}, index.parent / FILES[1])
    with pytest.raises(ValueError, match=rf"{FILES[1]}: .*'0.bias', which {FILES[0]} has, too"):
        read_headers(index.parent, FILES)


@pytest.mark.parametrize(
    "text", ["", "{junk", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 10**5]
)
def test_a_damaged_index(index, text):
    index.write_text(text)
    with pytest.raises(ValueError, match=r"damaged: .*copy or download it anew") as caught:
        read_index(index)
    assert str(caught.value).startswith(f"{index}: ")


@pytest.mark.parametrize("name", ["../other.safetensors", "folder/other.safetensors", "/other"])
def test_an_index_of_files_elsewhere(index, name):
    edit(index, ghost=name)
    with pytest.raises(ValueError, match=rf"{index}: expected names of files beside it.*{name}"):
        read_index(index)
