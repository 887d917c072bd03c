"""Folders that cannot be streamed are refused in words that name the file and the remedy."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.plans.table import FORMAT
from tests.streaming.folders import INDEX, SINGLE, unknown, write


@pytest.fixture
def source(tmp_path):
    unknown(tmp_path / "source", shards=3)
    return tmp_path / "source"


def stream(source, target=None, include="*", **options):
    target = target or source.parent / "target"
    given = {"rank": 2, "include": include, "progress": False, **options}
    return tdecomp.stream(source, target, "svd", **given)


def edit(file, **entries):
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*snapshot_download"):
        stream(tmp_path / "nowhere")


def test_missing_files_are_named(source):
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003.safetensors is missing"):
        stream(source)


@pytest.mark.parametrize("size", [3, 50, 600])
def test_truncated_files_are_named(source, size):
    file = source / "model-00001-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model-00001-of-00003.safetensors: damaged.*anew"):
        stream(source)


def test_files_that_are_no_safetensors_are_named(source):
    file = source / "model-00003-of-00003.safetensors"
    text = b"{not json"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match=r"model-00003-of-00003.safetensors: damaged"):
        stream(source)


def test_an_index_that_disagrees(source):
    index = json.loads((source / INDEX).read_text())
    places = {**index["weight_map"], "0.bias": "model-00003-of-00003.safetensors"}
    edit(source / INDEX, weight_map=places)
    with pytest.raises(ValueError, match=r"the index has '0.bias' in model-00003.*in model-00002"):
        stream(source)
    del places["0.bias"]
    edit(source / INDEX, weight_map=places)
    with pytest.raises(ValueError, match=r"the index has '0.bias' in no file"):
        stream(source)


def test_an_index_that_is_none(source):
    (source / INDEX).write_text("[]")
    with pytest.raises(ValueError, match=f"{INDEX}: damaged: index: expected an object"):
        stream(source)
    edit_map = {"weight_map": {"0.weight": "../elsewhere.safetensors"}}
    (source / INDEX).write_text(json.dumps(edit_map))
    with pytest.raises(ValueError, match="expected names of files beside it"):
        stream(source)


def lose(folder, shard):
    (folder / shard).unlink()


def cut(folder, shard):
    (folder / shard).write_bytes((folder / shard).read_bytes()[:-1])


def disagree(folder, shard):
    names = [f"made.up.{number}" for number in range(5)]
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder / INDEX, weight_map=places | dict.fromkeys(names, shard))


@pytest.mark.parametrize("damage", [lose, cut, disagree])
def test_load_refuses_damaged_folders_in_the_same_words(tmp_path, damage):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    result = tdecomp.decompose(model, "svd", rank=8, progress=False)
    result.save_pretrained(tmp_path, max_shard_size="4KB")
    shard = sorted(path.name for path in tmp_path.glob("model-*"))[1]
    damage(tmp_path, shard)
    with pytest.raises((ValueError, FileNotFoundError), match=shard) as streamed:
        stream(tmp_path)
    with pytest.raises(streamed.type) as loaded:
        tdecomp.load(tmp_path, model)
    assert str(loaded.value) == str(streamed.value)


def test_several_files_without_an_index(source):
    (source / INDEX).unlink()
    with pytest.raises(ValueError, match=f"3 files of safetensors without {INDEX}"):
        stream(source)


def test_pickled_weights(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pickled \(pytorch_model.bin\).*save_pretrained"):
        stream(tmp_path, tmp_path.parent / "target")


def test_no_weights_and_no_config(source, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        stream(tmp_path / "empty")
    (source / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        stream(source)


def test_an_unknown_architecture_says_what_it_takes(source):
    with pytest.raises(ValueError, match=r"'perceptron-of-my-own'.*include=.*of '0', '2', '4'"):
        stream(source, include=())
    with pytest.raises(ValueError, match=r"include: 'up' matches no"):
        stream(source, include="up")


def test_what_was_decomposed_already(source, tmp_path):
    stream(source, tmp_path / "once")
    with pytest.raises(ValueError, match="decomposed already"):
        stream(tmp_path / "once", tmp_path / "twice")
    config = tmp_path / "once/config.json"
    said = {**json.loads(config.read_text())["quantization_config"], "format": FORMAT + 1}
    edit(config, quantization_config={**said, "version": "9.0"})
    with pytest.raises(ValueError, match=r"tdecomp 9.0, in format .*update tdecomp"):
        stream(tmp_path / "once", tmp_path / "twice")


@pytest.mark.parametrize("where", ["source", "source/inside", "."])
def test_targets_in_the_source_or_around_it(source, where):
    with pytest.raises(ValueError, match="expected a folder of its own"):
        stream(source, source.parent / where)


def test_a_target_that_is_a_file(source, tmp_path):
    (tmp_path / "target").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        stream(source)


def test_quantized_tensors_are_copied(tmp_path):
    scales, packed = torch.ones(8, 1), torch.ones(8, 8, dtype=torch.int8)
    state = {"0.weight": torch.randn(8, 8), "1.weight": packed, "1.scales": scales}
    write(tmp_path / "source", state)
    (tmp_path / "source/config.json").write_text("{}")
    report = stream(tmp_path / "source", include=["0", "1"])
    assert report["0"].rank == 2
    assert report["1"].reason == "quantized: '1.weight' is stored as I8, and copied as it is"


def test_a_quantized_model_is_copied(source):
    edit(source / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    report = stream(source)
    assert not any(row.method for row in report)
    assert "'gptq', beside which there can be no chains" in report["0"].reason
    copied = json.loads((source.parent / "target/config.json").read_text())
    assert copied["quantization_config"] == {"quant_method": "gptq", "bits": 4}


def test_values_that_are_not_finite(tmp_path):
    weight = torch.randn(8, 8)
    weight[0, 0] = torch.nan
    write(tmp_path / "source", {"bad.weight": weight})
    (tmp_path / "source/config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"layer 'bad'.*1 of 64 entries.*exclude=\['bad'\]"):
        stream(tmp_path / "source")


def test_budgets_and_selectors_that_need_a_model(source):
    with pytest.raises(ValueError, match=r"macs are those of a call.*Budget\(params"):
        stream(source, rank=tdecomp.Budget(macs=0.5))
    with pytest.raises(ValueError, match="nothing is known of the outputs"):
        stream(source, rank=tdecomp.OutputVariance(0.9))


class Fitting(tdecomp.LocalSelector):
    """Asks for a fit, which a stream does not make to choose ranks."""

    def choose(self, candidate):
        return tdecomp.Choice(candidate, 1 if candidate.error_at(1) < 0.5 else 2)


def test_selectors_that_fit(source):
    with pytest.raises(ValueError, match="asks for more than singular values"):
        stream(source, rank=Fitting())


def test_matrices_alone_are_layers(tmp_path):
    state = {"table": torch.randn(8, 8), "conv.weight": torch.randn(4, 4, 3, 3)}
    write(tmp_path / "source", {**state, "fc.weight": torch.randn(8, 8), "fc.bias": torch.ones(7)})
    (tmp_path / "source/config.json").write_text("{}")
    report = stream(tmp_path / "source")
    assert {row.name: row.method for row in report} == {"table": None, "conv": None, "fc": "svd"}
    assert report["conv"].reason == "no matrix named *.weight"
    assert report["fc"].layer == tdecomp.LayerSpec.of(nn.Linear(8, 8, bias=False))


def test_a_single_file_of_any_name(tmp_path):
    unknown(tmp_path / "source")
    (tmp_path / "source" / SINGLE).rename(tmp_path / "source/mine.safetensors")
    stream(tmp_path / "source")
    assert (tmp_path / "target" / SINGLE).exists()
    assert not (tmp_path / "target/mine.safetensors").exists()


def test_the_home_of_the_user(tmp_path, monkeypatch):
    unknown(tmp_path / "source")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    report = tdecomp.stream(
        "~/source", Path("~/small"), "svd", rank=2, include="*", progress=False
    )  # fmt: skip
    assert (tmp_path / "small" / "config.json").is_file()
    assert not (tmp_path / "~").exists()
    plan = tdecomp.plan(Path("~/source"), "svd", rank=2, include="*", progress=False)
    assert [row.rank for row in plan] == [row.rank for row in report]
    with pytest.raises(FileNotFoundError, match="source: no such folder: ~nobody-here/source"):
        tdecomp.plan("~nobody-here/source", "svd", rank=2, progress=False)


@pytest.mark.parametrize("argument", ["source", "target"])
def test_what_is_no_folder(source, argument):
    given = {"source": source, "target": source.parent / "small"} | {argument: nn.Linear(4, 4)}
    with pytest.raises(TypeError, match=rf"^{argument}: expected the name .* got Linear; a model"):
        tdecomp.stream(**given, methods="svd", rank=2, progress=False)


def test_what_config_says_of_the_architecture(source):
    (source / "config.json").write_text(json.dumps({"model_type": "of-mine"}))
    with pytest.raises(
        ValueError, match=r"\(config\.json: model_type 'of-mine', no architectures\)"
    ):
        tdecomp.plan(source, "svd", rank=2, progress=False)
    (source / "config.json").write_text(json.dumps({"architecture": "net"}))
    with pytest.raises(ValueError, match=r"\(config\.json: architecture 'net'\)"):
        tdecomp.plan(source, "svd", rank=2, progress=False)


def test_a_model_without_layers(tmp_path):
    write(tmp_path / "source", {"scale": torch.ones(3)})
    (tmp_path / "source" / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"^include: '\*' matches none of the layers: .* has none$"
    ):
        stream(tmp_path / "source")
