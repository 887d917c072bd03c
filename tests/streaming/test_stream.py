"""A folder streamed into another one has what decomposing in memory gives, bit for bit."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tdecomp
from benchmarks.scale.killed import digests
from tdecomp.files.shards import layout_of
from tests.streaming.folders import INDEX, SINGLE, perceptron, unknown, write

RANKS = {
    "int": 4,
    "float": 0.4,
    "ratio": tdecomp.Ratio(0.4, of="params"),
    "energy": tdecomp.Energy(0.6),
    "vbmf": tdecomp.VBMF(weaken=0.5),
    "breakeven": "breakeven",
    "budget": tdecomp.Budget(params=0.5),
    "rounded": tdecomp.Budget(params=0.5, round_to=4),
    "by layer": {"0": 3, "2": tdecomp.Energy(0.5)},
}
QUIET = {"progress": False}


@pytest.fixture
def source(tmp_path):
    unknown(tmp_path / "source", shards=3)
    return tmp_path / "source"


@cache
def in_memory(methods, rank):
    return tdecomp.decompose(perceptron(), methods, rank=RANKS[rank], **QUIET)


def stream(source, target, methods="svd", rank=4, include="*", **options):
    return tdecomp.stream(source, target, methods, rank=rank, include=include, **QUIET, **options)


def tensors_in(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def same(tensors, others):
    return tensors.keys() == others.keys() and all(
        torch.equal(tensors[name], others[name]) and tensors[name].dtype == others[name].dtype
        for name in tensors
    )


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("methods", ["svd", ("split-svd", "tt", "svd")])
def test_it_has_the_bits_of_decomposing_in_memory(source, tmp_path, methods, rank):
    if methods != "svd" and rank in ("energy", "vbmf", "by layer"):
        methods = ("split-svd", "svd")  # the ranks of a train have no spectra
    result = in_memory(methods, rank)
    report = stream(source, tmp_path / "target", methods, RANKS[rank])
    for row, other in zip(report, result.report, strict=True):
        assert (row.name, row.method, row.rank) == (other.name, other.method, other.rank)
        assert row.weight_error == other.weight_error
        assert (row.reason, row.note) == (other.reason, other.note)
    assert (report.before, report.after) == (result.report.before, result.report.after)
    assert same(tensors_in(tmp_path / "target"), result.model.state_dict())


def test_a_draft_that_chose_the_rank_is_where_the_fit_starts(tmp_path):
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64))
    write(tmp_path / "source", model.state_dict())
    (tmp_path / "source/config.json").write_text("{}")
    budget = tdecomp.Budget(params=0.3)
    result = tdecomp.decompose(model, "tt", rank=budget, **QUIET)
    stream(tmp_path / "source", tmp_path / "target", "tt", budget)
    assert same(tensors_in(tmp_path / "target"), result.model.state_dict())


def test_what_is_not_decomposed_is_copied(source, tmp_path):
    before = tensors_in(source)
    report = stream(source, tmp_path / "target", exclude="2")
    after = tensors_in(tmp_path / "target")
    assert report["2"].reason == "excluded by '2'"
    assert torch.equal(after["2.weight"], before["2.weight"])
    assert torch.equal(after["0.1.bias"], before["0.bias"])
    assert "0.weight" not in after


def test_dtypes_that_torch_lacks_are_copied(tmp_path):
    layer, packed = torch.randn(16, 16).numpy().tobytes(), b"6bytes"
    layout = layout_of("", {"0.weight": ("F32", (16, 16), len(layer)), "packed": ("F4", (12,), 6)})
    source = tmp_path / "source"
    source.mkdir()
    (source / SINGLE).write_bytes(layout.header + layer + packed)
    (source / "config.json").write_text("{}")
    stream(source, tmp_path / "target", include="0")
    assert (tmp_path / "target" / SINGLE).read_bytes().endswith(packed)


def test_files_are_named_as_transformers_names_them(source, tmp_path):
    stream(source, tmp_path / "target")
    names = {path.name for path in (tmp_path / "target").iterdir()}
    assert {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)} | {INDEX} <= names
    index = json.loads((tmp_path / "target" / INDEX).read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "target" / file)
    total = sum(tensor.nbytes for tensor in tensors_in(tmp_path / "target").values())
    assert index["metadata"]["total_size"] == total


def test_all_other_files_follow(source, tmp_path):
    (source / "tokenizer.json").write_text("{}")
    (source / "onnx").mkdir()
    (source / "onnx/model.txt").write_text("nested")
    (source / "README.md").write_text("# A model card\n")
    (source / "pytorch_model.bin").write_bytes(b"the same weights again")
    (source / ".cache").write_text("hidden")
    stream(source, tmp_path / "target")
    target = tmp_path / "target"
    assert (target / "tokenizer.json").read_text() == "{}"
    assert (target / "onnx/model.txt").read_text() == "nested"
    assert (target / "README.md").read_text().startswith("# A model card\n")
    assert "tdecomp.load" in (target / "README.md").read_text()
    assert not (target / "pytorch_model.bin").exists()
    assert not list(target.glob(".*"))
    config = json.loads((target / "config.json").read_text())
    assert config["model_type"] == json.loads((source / "config.json").read_text())["model_type"]
    assert config["quantization_config"]["plan"]["rows"][0]["rank"] == 4


def test_it_loads_into_a_fresh_model(source, tmp_path):
    stream(source, tmp_path / "target")
    loaded = tdecomp.load(tmp_path / "target", perceptron())
    x = torch.randn(3, 24)
    assert torch.equal(loaded(x), in_memory("svd", "int").model(x))


@pytest.mark.parametrize("rank", ["int", "budget"])
def test_workers_write_the_same(source, tmp_path, rank):
    stream(source, tmp_path / "alone", rank=RANKS[rank])
    with ThreadPoolExecutor(2) as executor:
        stream(source, tmp_path / "shared", rank=RANKS[rank], executor=executor)
    assert digests(tmp_path / "alone") == digests(tmp_path / "shared")


def test_an_executor_that_was_shut_down(source, tmp_path):
    with ThreadPoolExecutor(1) as executor:
        pass
    with pytest.raises(ValueError, match="it was shut down"):
        stream(source, tmp_path / "target", executor=executor)
    assert not (tmp_path / "target").exists()


@dataclass(frozen=True)
class Named(tdecomp.SVD):
    """A method of one's own, known to nobody by its name."""

    name: ClassVar[str] = "svd-of-mine"


class Unknown(tdecomp.SVD):
    """A method that takes the name of another."""


@pytest.mark.parametrize(
    "method, words", [(Named(), r"tdecomp.register\(Named\)"), (Unknown(), "use a name of its own")]
)
def test_methods_that_nobody_could_read_the_plan_with(source, tmp_path, method, words):
    whole = tdecomp.Budget(params=0.5)  # for which all layers would be read before there is a plan
    calls = Calls()
    with pytest.raises(ValueError, match=words):
        stream(source, tmp_path / "target", method, whole, executor=calls)
    assert calls.number == 0
    assert not (tmp_path / "target").exists()


class Calls(ThreadPoolExecutor):
    """Counts what it is asked to run."""

    number = 0

    def submit(self, function, /, *args, **kwargs):
        self.number += bool(args)
        return super().submit(function, *args, **kwargs)


def test_bounded_memory_changes_nothing(source, tmp_path):
    stream(source, tmp_path / "free")
    stream(source, tmp_path / "bounded", max_memory=30_000)
    assert digests(tmp_path / "free") == digests(tmp_path / "bounded")


def test_a_layer_that_needs_more_memory_is_named(source, tmp_path):
    with pytest.raises(ValueError, match=r"layer '2'.*max_memory is 20.0kB.*exclude=\['2'\]"):
        stream(source, tmp_path / "target", max_memory=20_000)
    stream(source, tmp_path / "target", max_memory=20_000, exclude="2")
    with pytest.raises(ValueError, match="expected a number of bytes"):
        stream(source, tmp_path / "other", max_memory=-1)


@pytest.mark.parametrize("device", ["meta", "no such device", "cuda:99", 1.5])
def test_devices_that_are_none(source, tmp_path, device):
    with pytest.raises(ValueError, match="device: expected one that torch can compute on here"):
        stream(source, tmp_path / "target", device=device)
    assert not (tmp_path / "target").exists()


def test_nothing_to_decompose_is_a_copy(source, tmp_path):
    report = stream(source, tmp_path / "target", exclude="*")
    assert not any(row.method for row in report)
    assert same(tensors_in(tmp_path / "target"), tensors_in(source))
    assert (tmp_path / "target/config.json").read_text().count("quantization_config") == 0
    with pytest.raises(
        ValueError, match=r"target: config\.json has .* nothing is decomposed there"
    ):
        tdecomp.load(tmp_path / "target", perceptron())


def test_the_report_can_be_printed(source, tmp_path):
    report = stream(source, tmp_path / "target")
    assert "3 of 3 layers decomposed" in str(report)
    assert report["0"].fit_seconds > 0


def test_a_model_card_in_another_encoding(source, tmp_path):
    card = "größer".encode("latin-1")
    (source / "README.md").write_bytes(card)
    stream(source, tmp_path / "target")
    written = (tmp_path / "target" / "README.md").read_bytes()
    assert written.startswith(card + b"\n\n")
    assert b"tdecomp.load" in written


@pytest.mark.parametrize("shards", [1, 2])
def test_files_are_named_as_diffusers_names_them(tmp_path, shards):
    unknown(tmp_path / "source", shards=shards)
    (tmp_path / "source" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    stream(tmp_path / "source", tmp_path / "target")
    stem = "diffusion_pytorch_model"
    parts = {f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)}
    many = {*parts, f"{stem}.safetensors.index.json"}
    names = {file.name for file in (tmp_path / "target").glob("*.safetensors*")}
    assert names == (many if shards == 2 else {f"{stem}.safetensors"})
    loaded = tdecomp.load(tmp_path / "target", perceptron())
    assert same(loaded.state_dict(), tensors_in(tmp_path / "target"))
