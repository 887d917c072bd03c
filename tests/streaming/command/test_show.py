"""What is told of files and folders, from their headers alone."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tdecomp
from tdecomp.plans.table import FORMAT
from tdecomp.streaming.command.show import bytes_in_words, contents_of
from tdecomp.streaming.target import WorkFolder
from tests.streaming.folders import INDEX, SINGLE, perceptron, unknown, write


@pytest.fixture(scope="module")
def result():
    return tdecomp.decompose(perceptron(), "svd", rank=0.25, progress=False)


def decomposed_folder(folder, result, **changes):
    write(folder, result.model.state_dict(), shards=2)
    said = {"quant_method": "tdecomp", "format": FORMAT, "version": tdecomp.__version__}
    said |= {"plan": result.plan.to_dict(), **changes}
    config = {"architectures": ["Perceptron"], "quantization_config": said}
    (folder / "config.json").write_text(json.dumps(config))


def cells(text, first):
    """The cells of the line that begins with this one."""
    (line,) = (line for line in text.splitlines() if line.startswith(first))
    return re.split(r" {2,}", line.strip())


def test_a_decomposed_file(tmp_path, result):
    result.save(tmp_path / "small.safetensors")
    found = contents_of(tmp_path / "small.safetensors")
    state = result.model.state_dict()
    assert found.plan is not None
    assert found.plan.rows == result.plan.rows
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {
        name: tuple(value.shape) for name, value in state.items()
    }
    text = str(found)
    assert text.startswith(f"{tmp_path}/small.safetensors: decomposed by tdecomp ")
    assert str(result.plan) in text
    nbytes = sum(value.nbytes for value in state.values())
    values = sum(value.numel() for value in state.values())
    assert cells(text, "all, in 1 file") == [
        "all, in 1 file", f"{len(state)}", f"{values}", bytes_in_words(nbytes)
    ]  # fmt: skip


def test_a_decomposed_folder(tmp_path, result):
    decomposed_folder(tmp_path, result)
    found = contents_of(tmp_path)
    assert found.plan is not None
    assert found.plan.rows == result.plan.rows
    assert found.tensors.keys() == result.model.state_dict().keys()
    assert str(found).startswith(f"{tmp_path}: decomposed by tdecomp {tdecomp.__version__}")
    assert cells(str(found), "all")[0] == "all, in 2 files"


def test_a_folder_that_was_streamed_and_saved_again(tmp_path, result):
    """The report of the stream is no longer that of what is there."""
    unknown(tmp_path / "large")
    options = {"rank": 4, "include": "*", "progress": False}
    report = tdecomp.stream(tmp_path / "large", tmp_path / "small", "svd", **options)
    assert str(contents_of(tmp_path / "small").report) == str(report)
    for file in (tmp_path / "small").glob("*.safetensors*"):
        file.unlink()
    decomposed_folder(tmp_path / "small", result)
    found = contents_of(tmp_path / "small")
    assert found.report is None
    assert str(result.plan) in str(found)
    (tmp_path / "small" / "tdecomp.json").write_text('{"rows": 3}')
    with pytest.raises(ValueError, match=r"tdecomp\.json: rows: expected a list, got 3"):
        contents_of(tmp_path / "small")


def test_a_stream_that_is_not_finished(tmp_path, result):
    folder = WorkFolder(tmp_path)
    folder.begin({"rank": "4"})
    assert str(contents_of(tmp_path)) == (
        f"{tmp_path}: a stream that is not finished, the same command goes on with it"
    )
    folder.keep_plan(result.plan, frozenset())
    assert str(contents_of(tmp_path)).endswith(f"goes on with it\n\n{result.plan}")


def test_sizes_are_those_of_each_type(tmp_path):
    tensors = {
        "a": torch.zeros(1000, 3, dtype=torch.bfloat16), "b": torch.zeros(5, dtype=torch.bfloat16),
        "c": torch.zeros(7, 2), "scalar": torch.tensor(1),
    }  # fmt: skip
    save_file(tensors, tmp_path / "file")
    text = str(contents_of(tmp_path / "file"))
    assert cells(text, "BF16") == ["BF16", "2", "3.00k", "6.01 kB"]
    assert cells(text, "F32") == ["F32", "1", "14", "56 B"]
    assert cells(text, "I64") == ["I64", "1", "1", "8 B"]
    assert cells(text, "all, in 1 file")[1:] == ["4", "3.02k", "6.07 kB"]


def test_a_plan(tmp_path, result):
    (tmp_path / "plan.json").write_text(result.plan.to_json(), encoding="utf-8")
    found = contents_of(tmp_path / "plan.json")
    assert str(found) == f"{tmp_path}/plan.json: a plan\n\n{result.plan}"


def test_an_ordinary_folder_lists_its_layers(tmp_path):
    unknown(tmp_path, shards=2)
    text = str(contents_of(tmp_path))
    assert "an ordinary checkpoint of perceptron-of-my-own, nothing is decomposed" in text
    assert cells(text, "2.weight") == ["2.weight", "32 × 32", "F32", "1", "1.02k"]
    assert "bias" not in text  # which is no layer
    assert cells(text, "all")[:2] == ["all, in 2 files", "5"]


def test_layers_alike_but_for_their_number_are_one_line(tmp_path):
    blocks = nn.ModuleList(
        nn.ModuleDict({"up": nn.Linear(8, 6), "down": nn.Linear(6, 8)}) for _ in range(12)
    )
    blocks.append(nn.ModuleDict({"up": nn.Linear(4, 4)}))
    save_file(blocks.state_dict(), tmp_path / "file.safetensors")
    text = str(contents_of(tmp_path / "file.safetensors"))
    assert cells(text, "*.up.weight")[1:] == ["6 × 8", "F32", "12", "576"]
    assert cells(text, "*.down.weight")[1:] == ["8 × 6", "F32", "12", "576"]
    assert cells(text, "12.up.weight")[1:] == ["4 × 4", "F32", "1", "16"]


def test_types_have_lines_of_their_own(tmp_path):
    tensors = {f"blocks.{i}.weight": torch.ones(2, 2) for i in range(3)}
    tensors["blocks.3.weight"] = torch.ones(2, 2, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "file")
    text = str(contents_of(tmp_path / "file"))
    assert cells(text, "blocks.*.weight")[2:4] == ["F32", "3"]
    assert cells(text, "blocks.3.weight")[2:4] == ["BF16", "1"]


def test_numbers_within_words_stay(tmp_path):
    save_file({"fc1.weight": torch.ones(2, 2), "fc2.weight": torch.ones(2, 2)}, tmp_path / "file")
    text = str(contents_of(tmp_path / "file"))
    assert cells(text, "fc1.weight")
    assert cells(text, "fc2.weight")


def test_no_weights_are_read(tmp_path):
    """Of a file that would not fit into memory, since most of it is a hole."""
    nbytes = 2**42
    entry = {"dtype": "BF16", "shape": [2**20, 2**21], "data_offsets": [0, nbytes]}
    header = json.dumps({"huge.weight": entry}).encode()
    with (tmp_path / SINGLE).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + nbytes)
    for path in (tmp_path, tmp_path / SINGLE):
        text = str(contents_of(path))
        assert cells(text, "huge.weight")[1] == "1048576 × 2097152"
        assert cells(text, "all, in 1 file")[-1] == "4.40 TB"


def test_moments_are_none_of_it(tmp_path):
    model = perceptron()
    moments = tdecomp.calibrate(model, [torch.randn(8, 24)], progress=False)
    moments.save(tmp_path / "moments.safetensors")
    assert "moments, which tdecomp.Moments.load reads" in str(
        contents_of(tmp_path / "moments.safetensors")
    )


def cut(folder, result):
    decomposed_folder(folder, result)
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def without_a_shard(folder, result):
    decomposed_folder(folder, result)
    (folder / "model-00002-of-00002.safetensors").unlink()


def lying_index(folder, result):
    decomposed_folder(folder, result)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].pop("0.0.weight")
    (folder / INDEX).write_text(json.dumps(index))


def index_of_text(folder, result):
    decomposed_folder(folder, result)
    (folder / INDEX).write_text("[1, 2")


def config_of_text(folder, result):
    decomposed_folder(folder, result)
    (folder / "config.json").write_text("{")


def other_plan(folder, result):
    decomposed_folder(folder, result, plan={"rows": 3})


def later(folder, result):
    decomposed_folder(folder, result, format=FORMAT + 1, version="9.9")


def pickled(folder, result):
    torch.save(result.model.state_dict(), folder / "model.bin")


def pipeline(folder, result):
    for name in ("vae", "unet"):
        (folder / name).mkdir()
        decomposed_folder(folder / name, result)


def empty(folder, result):
    del folder, result


@pytest.mark.parametrize(
    "make, words",
    [
        (cut, r"model-00001-of-00002\.safetensors: damaged"),
        (without_a_shard, r"model-00002-of-00002\.safetensors is missing"),
        (lying_index, r"the index has '0\.0\.weight' in no file"),
        (index_of_text, INDEX),
        (config_of_text, r"config\.json"),
        (other_plan, r"config\.json: methods: expected an object"),
        (later, r"config\.json: .*written by tdecomp 9\.9.*update tdecomp"),
        (pickled, r"model\.bin.*runs code"),
        (pipeline, "expected one of its folders: unet, vae"),
        (empty, r"no \*\.safetensors; expected a folder with weights"),
    ],
)
def test_folders_that_cannot_be_told(tmp_path, result, make, words):
    make(tmp_path, result)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        contents_of(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_files_that_cannot_be_told(tmp_path, result):
    file = tmp_path / "small.safetensors"
    result.save(file)
    content = file.read_bytes()
    for damaged in (b"", content[:5], content[:-1], content + b"0", b"x" * 100):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"small\.safetensors: damaged or no safetensors"):
            contents_of(file)
    torch.save({}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt: a pickled file runs code"):
        contents_of(tmp_path / "model.pt")
    (tmp_path / "some.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match=r"some\.json: methods"):
        contents_of(tmp_path / "some.json")
    save_file({"a": torch.ones(1)}, file, {"tdecomp": "{"})
    with pytest.raises(ValueError, match=r"small\.safetensors: not JSON"):
        contents_of(file)
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*none"):
        contents_of(tmp_path / "none")


def test_bytes():
    assert [bytes_in_words(n) for n in (0, 999, 1000, 123_456, 2_200_000_000)] == [
        "0 B", "999 B", "1.00 kB", "123 kB", "2.20 GB"
    ]  # fmt: skip


def test_one_file_of_a_decomposed_folder(tmp_path):
    unknown(tmp_path / "large", shards=2)
    options = {"rank": 4, "include": "*", "progress": False}
    tdecomp.stream(tmp_path / "large", tmp_path / "small", "svd", **options)
    file = tmp_path / "small" / "model-00001-of-00002.safetensors"
    words = f"one file of a decomposed folder, `tdecomp show {file.parent}` shows its plan"
    assert str(contents_of(file)).startswith(f"{file}: {words}\n\n")


def test_json_that_is_no_plan(tmp_path):
    unknown(tmp_path, shards=2)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: format: .* no plan of tdecomp"):
        contents_of(tmp_path / "tokenizer.json")
    for part in ("config.json", INDEX):
        with pytest.raises(
            ValueError, match=rf"{part}: a part of a folder, .*`tdecomp show {tmp_path}`"
        ):
            contents_of(tmp_path / part)
