"""Folders of safetensors files with the plan in `config.json`: round trips, and what is refused."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import tdecomp
from tests.checkpoint.networks import assert_same, batch, decomposed, net
from tests.unchanged import unchanged

CONFIG, README, ONE = "config.json", "README.md", "model.safetensors"
INDEX = f"{ONE}.index.json"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A result, and its folder of several shards, that no test changes."""
    result, folder = decomposed(), tmp_path_factory.mktemp("kept") / "small"
    result.save_pretrained(folder, max_shard_size="4KB")
    return result, folder


@pytest.fixture
def folder(kept, tmp_path):
    """A copy of that folder."""
    return Path(shutil.copytree(kept[1], tmp_path / "small"))


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def shards_of(folder):
    return sorted(folder.glob("model-*.safetensors"))


def names(folder):
    return {file.name for file in folder.iterdir()}


def refused(folder, *words, model=None, error=ValueError):
    model = net() if model is None else model
    with unchanged(model), pytest.raises(error) as caught:
        tdecomp.load(folder, model)
    for word in words:
        assert str(word) in str(caught.value)
    assert str(caught.value).count(f"{folder}:") + str(caught.value).count(f"{folder} ") <= 1


# -- round trips --------------------------------------------------------------------------------


def test_round_trip_in_shards(kept):
    result, folder = kept
    shards = shards_of(folder)
    assert names(folder) == {CONFIG, README, INDEX, *(shard.name for shard in shards)}
    assert [shard.name for shard in shards] == [
        f"model-{at:05}-of-{len(shards):05}.safetensors" for at in range(1, len(shards) + 1)
    ]
    index = json.loads((folder / INDEX).read_text())
    stored = {}
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 4000
        with safe_open(shard, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        stored |= dict.fromkeys(tensors, shard.name)
    assert index["weight_map"] == stored
    # What has several names is stored under one.
    assert {"head.weight", "embed.weight"} & stored.keys() == {"embed.weight"}
    fresh = net(seed=5)
    with unchanged(fresh):
        loaded = tdecomp.load(folder, fresh)
    assert_same(loaded, result.model, batch())


@pytest.mark.parametrize("size", [10**9, "1GB", "2 mb"])
def test_small_models_are_one_file(tmp_path, size):
    result = decomposed()
    result.save_pretrained(str(tmp_path), max_shard_size=size)
    assert names(tmp_path) == {CONFIG, README, ONE}
    assert_same(tdecomp.load(str(tmp_path), net(seed=5)), result.model)


@pytest.mark.parametrize("size", [0, -1, True, "5XB", "GB", 1.5, None])
def test_sizes_that_are_none(tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_size: expected bytes"):
        decomposed().save_pretrained(tmp_path / "small", max_shard_size=size)
    assert not (tmp_path / "small").exists()


class Buffered(nn.Module):
    """A buffer that is in no state dict, as rotary frequencies are."""

    def __init__(self, value=1.0):
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.register_buffer("frequencies", torch.full((16,), value), persistent=False)

    def forward(self, x):
        return self.layer(x) * self.frequencies


def test_meta_model_gets_values_and_buffers(tmp_path):
    result = tdecomp.decompose(Buffered(3.0), "svd", rank=4, progress=False)
    result.save_pretrained(tmp_path)
    with torch.device("meta"):
        fresh = Buffered()
    loaded, x = tdecomp.load(tmp_path, fresh), torch.randn(2, 16)
    assert torch.equal(loaded(x), result.model(x))
    (tmp_path / "buffers_without_state.safetensors").unlink()
    refused(tmp_path, "no values for frequencies", "include_buffers=False", model=fresh)
    assert torch.equal(tdecomp.load(tmp_path, Buffered()).frequencies, torch.ones(16))


def test_saving_over_another_leaves_nothing_of_it_but_what_others_wrote(folder):
    (folder / "notes.txt").write_text("mine")
    edit(folder / CONFIG, lambda config: config.update(width=16))
    (folder / README).write_text("# A card\n\n" + (folder / README).read_text())
    result = decomposed(method="svd")
    result.save_pretrained(folder)
    assert names(folder) == {CONFIG, README, ONE, "notes.txt"}
    assert_same(tdecomp.load(folder, net(seed=5)), result.model)
    assert json.loads((folder / CONFIG).read_text())["width"] == 16
    card = (folder / README).read_text()
    assert card.startswith("# A card\n\n## Decomposed by tdecomp")
    assert card.count("tdecomp.load") == 1


def test_plan_in_the_configuration_is_that_of_the_result(kept):
    result, folder = kept
    described = json.loads((folder / CONFIG).read_text())["quantization_config"]
    assert (described["quant_method"], described["format"]) == ("tdecomp", 2)
    assert described["version"] == tdecomp.__version__
    assert described["plan"] == json.loads(result.plan.to_json())


def test_tokenizer_writes_its_files_too(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (Path(folder) / "tokenizer.json").write_text("{}")

    decomposed().save_pretrained(tmp_path, tokenizer=Tokenizer())
    assert (tmp_path / "tokenizer.json").exists()


def both(result, folder):
    """What a folder and a file bring back."""
    result.save_pretrained(folder / "small")
    result.save(folder / "small.safetensors")
    return [tdecomp.load(folder / name, net(seed=5)) for name in ("small", "small.safetensors")]


def test_model_decomposed_in_two_steps(tmp_path):
    first = tdecomp.decompose(net(), "svd", rank={"point": 4}, progress=False)
    result = tdecomp.decompose(first.model, "tucker2", rank={"up": 4}, progress=False)
    for loaded in both(result, tmp_path):
        assert_same(loaded, result.model, batch())


def test_layer_that_was_put_back_by_hand(tmp_path):
    result = decomposed()
    result.model.point = result.model.point.to_layer()
    for loaded in both(result, tmp_path):
        assert type(loaded.point) is nn.Conv2d
        assert_same(loaded, result.model, batch())


def test_part_that_was_decomposed_by_itself(tmp_path):
    whole = net()
    part = tdecomp.decompose(whole.stem, "lowrank", rank=4, progress=False)
    whole.stem = part.model
    for loaded in both(tdecomp.Decomposition(whole, part.report, part.plan), tmp_path):
        assert_same(loaded, whole, batch())


@dataclass(frozen=True)
class Mine(tdecomp.SVD):
    """A user's own method."""

    name: ClassVar[str] = "mine"


@pytest.mark.usefixtures("own_methods")
def test_own_methods_are_registered_where_they_are_loaded(tmp_path):
    result = tdecomp.decompose(net(), Mine(), rank={"point": 4}, progress=False)
    result.save_pretrained(tmp_path)
    refused(tmp_path, "unknown method 'mine'", "tdecomp.register")
    tdecomp.register(Mine)
    assert_same(tdecomp.load(tmp_path, net(seed=5)), result.model)


# -- what could not be loaded again -------------------------------------------------------------


def not_saved(result, folder, words, error=ValueError):
    with pytest.raises(error, match=words):
        result.save_pretrained(folder / "small")
    assert not (folder / "small").exists()


def test_fused_batchnorm_is_refused(tmp_path):
    model = nn.Sequential(nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16)).eval()
    result = tdecomp.decompose(model, "lowrank", rank=4, progress=False)
    fused = tdecomp.fuse_batchnorm(result.model)
    fused = tdecomp.Decomposition(fused, result.report, result.plan)
    not_saved(fused, tmp_path, r"layer '0' stands for .*fuse_batchnorm.*save first")


def test_adapters_are_refused(tmp_path):
    result = decomposed()
    result.model.point[0].base_layer = nn.Linear(2, 2)
    not_saved(result, tmp_path, r"'point\.0' holds an adapter.*merge_and_unload")


def test_plan_of_other_ranks_is_refused(tmp_path):
    result = tdecomp.decompose(net(), "svd", rank={"point": 4}, progress=False)
    other = tdecomp.Decomposition(result.model, result.report, result.plan.edit("point", rank=3))
    not_saved(other, tmp_path, "layer 'point' is decomposed by svd at rank 4, .* rank 3")


def test_tensors_that_safetensors_cannot_hold_are_refused(tmp_path):
    result = decomposed()
    result.model.register_buffer("odd", torch.eye(3).to_sparse())
    not_saved(result, tmp_path, "'odd' of the state dict is a .*only tensors can be saved")


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"tokenizer: expected a tokenizer .*got str"):
        decomposed().save_pretrained(tmp_path / "small", tokenizer="small")
    assert not (tmp_path / "small").exists()


def test_file_in_the_place_of_the_folder_and_unknown_options_are_refused(tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(NotADirectoryError, match="is a file; expected the name of a folder"):
        decomposed().save_pretrained(tmp_path / "file")
    with pytest.raises(TypeError, match="unknown options variant: Net has no save_pretrained"):
        decomposed().save_pretrained(tmp_path / "small", variant="fp16")


# -- folders that do not fit --------------------------------------------------------------------


def test_folder_of_an_ordinary_model_is_refused(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refused(folder, "config.json has no quantization_config", "a folder that tdecomp saved")


def test_missing_shard_is_named(folder):
    gone = shards_of(folder)[1]
    gone.unlink()
    refused(folder, f"{gone.name} is missing", INDEX, error=FileNotFoundError)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_shard_is_named(folder, share):
    shard = shards_of(folder)[1]
    raw = shard.read_bytes()
    shard.write_bytes(raw[: int(share * len(raw))])
    refused(folder, shard, "damaged or no safetensors file")


def test_index_that_names_tensors_which_no_shard_has(folder):
    edit(folder / INDEX, lambda index: index["weight_map"].update(ghost=shards_of(folder)[0].name))
    refused(folder, f"the index has 'ghost' in {shards_of(folder)[0].name}, it is in no file")


def test_index_that_lacks_tensors_or_has_them_elsewhere(folder):
    first, second = (shard.name for shard in shards_of(folder)[:2])

    def change(index):
        files = index["weight_map"]
        moved = next(name for name, file in files.items() if file == first)
        lost = next(name for name, file in files.items() if file == second)
        files[moved] = second
        del files[lost]
        return moved, lost

    content = json.loads((folder / INDEX).read_text())
    moved, lost = change(content)
    (folder / INDEX).write_text(json.dumps(content))
    words = f"{moved!r} in {second}, it is in {first}", f"{lost!r} in no file, it is in {second}"
    refused(folder, folder / INDEX, *words)


@pytest.mark.parametrize("text", ["", "{junk", "[]", "{}", '{"weight_map": 3}'])
def test_junk_index(folder, text):
    (folder / INDEX).write_text(text)
    refused(folder, folder / INDEX, "damaged")


def test_index_that_leads_out_of_the_folder(folder):
    edit(folder / INDEX, lambda index: index["weight_map"].update(ghost="../other.safetensors"))
    refused(folder, INDEX, "expected names of files beside it, got ../other.safetensors")


def test_folder_without_weights_or_without_a_configuration(folder, tmp_path):
    refused(tmp_path, "has no config.json")
    for file in (folder / INDEX, *shards_of(folder)):
        file.unlink()
    refused(folder, "has no weights", ONE, "variant")


@pytest.mark.parametrize("text", ["", "{junk", "[]", "3"])
def test_junk_configuration(folder, text):
    (folder / CONFIG).write_text(text)
    refused(folder, folder / CONFIG, "damaged")


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"quant_method": "bitsandbytes"}, ["bitsandbytes", "a model that tdecomp saved"]),
        ({"format": 3, "version": "9.8.7"}, ["format 3", "9.8.7", "update tdecomp"]),
        ({"format": 1}, ["format 1", "make it anew"]),
        ({"format": None}, ["format"]),
        ({"plan": None}, ["plan"]),
        ({"plan": {"rows": 3}}, ["methods"]),
    ],
    ids=["other", "newer", "older", "no format", "no plan", "junk plan"],
)
def test_description_of_another_version_or_kind(folder, entries, words):
    edit(folder / CONFIG, lambda config: config["quantization_config"].update(entries))
    refused(folder, folder, *words)


def test_configuration_without_a_plan(folder):
    edit(folder / CONFIG, lambda config: config.pop("quantization_config"))
    refused(folder, "quantization_config")


def test_another_architecture(folder):
    refused(folder, "layer 'stem.0'", model=net(width=24))


def test_layer_left_alone_of_another_stride(tmp_path):
    result = tdecomp.decompose(net(), "svd", rank={"point": 4}, progress=False)
    result.save_pretrained(tmp_path)
    fresh = net(seed=5)
    fresh.up.stride = (1, 1)
    refused(tmp_path, "layer 'up': got ConvTranspose2d", model=fresh)


def test_tensors_of_another_shape_and_missing_ones(folder):
    shard = shards_of(folder)[0]
    tensors = load_file(shard)
    name = next(iter(tensors))
    save_file({**tensors, name: torch.ones(3, 3, 3)}, shard)
    refused(folder, "another shape", name)
    edit(folder / INDEX, lambda index: index["weight_map"].pop(name))
    save_file({key: value for key, value in tensors.items() if key != name}, shard)
    refused(folder, "missing", name)
