import contextlib
import io
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.compare import build_parser, choose_settings, main, prepare, run
from benchmarks.support.models import load_model
from benchmarks.support.networks import ResNet20
from benchmarks.support.settings import Setting

QUICK = ["--rounds", "1", "--batch-size", "4", "--finetune", "2", "--data-images", "8"]


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """One quick run on the default model: what it wrote to the folder and to the screen."""
    out = tmp_path_factory.mktemp("results")
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        main([*QUICK, "--methods", "tucker2", "lowrank", "--out", str(out)])
    return out, screen.getvalue()


@pytest.mark.slow
def test_the_table_has_a_line_for_each_network(digits_run):
    _, text = digits_run
    assert "digits_vgg on handwritten digits" in text
    starts = [tuple(line.split()[:2]) for line in text.splitlines() if line.strip()]
    for line in (("original", "–"), ("tucker2", "0.1"), ("lowrank", "0.1"), ("tucker2", "vbmf")):
        assert line in starts
    assert starts.count(("tucker2", "+")) == 2
    assert starts.count(("lowrank", "+")) == 1
    assert "in 8 training images without labels" in text
    assert "the original too, is fine-tuned" in text
    assert "left out" not in text


@pytest.mark.slow
def test_the_json_holds_what_the_table_says(digits_run):
    out, _ = digits_run
    content = json.loads((out / "compare-digits_vgg.json").read_text(encoding="utf-8"))
    assert content["versions"].keys() == {"python", "tdecomp", "torch", "tensorly", "numpy"}
    assert content["machine"].keys() == {"cpu", "cores", "torch_threads", "system"}
    assert content["machine"]["torch_threads"] == torch.get_num_threads()
    assert content["arguments"]["seed"] == 0
    assert content["protocol"]["finetune"] == 2
    assert content["protocol"]["data_images"] == 8
    original, *rows = content["measurements"]
    assert [(row["method"], row["data"]) for row in rows] == [
        ("tucker2", False),
        ("tucker2", True),
        ("lowrank", False),
        ("lowrank", True),
        ("tucker2", False),
        ("tucker2", True),
    ]
    assert original["label"] == "original"
    assert original["accuracy_before"] >= 0.98
    for row in rows:
        assert 0 < row["macs_ratio"] < 1
        assert row["macs_ratio"] == row["macs"] / original["macs"]
        assert row["latency"]["median"] > 0
        assert 0 < row["weight_error"] < 2
        assert row["output_error"] > 0
        errors = [one["output_error"] for one in row["layers"] if one["method"]]
        assert row["output_error"] == pytest.approx(sum(errors) / len(errors))
        assert 0 <= row["accuracy_after"] <= 1
        assert row["decompose_seconds"] > 0
        assert 0 < row["layers_changed"] <= row["layers_total"] == len(row["layers"])
    assert rows[0]["macs_ratio"] == pytest.approx(0.1, abs=0.02)
    for by_weights, by_data in zip(rows[::2], rows[1::2], strict=True):
        assert by_data["rank"] == by_weights["rank"]
        assert by_data["macs"] == by_weights["macs"]


@pytest.mark.slow
def test_the_figure_is_a_picture(digits_run):
    out, _ = digits_run
    assert (out / "compare-digits_vgg.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_users_own_weights_and_images(folder, tmp_path, capsys):
    save_file(ResNet20(classes=10).state_dict(), tmp_path / "w.safetensors")
    for split in ("train", "val"):
        for i in range(8):  # ten classes in all, as the network has
            shutil.copytree(folder / split / "red", folder / split / f"red{i}")
    options = ["--model", "resnet20", "--weights", str(tmp_path / "w.safetensors")]
    options += ["--data", str(folder), "--methods", "lowrank", "--rank", "0.75", "0.5"]
    main([*options, *QUICK, "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert "resnet20 on colours (20 images to judge by)" in text
    assert "0.75" in text
    content = json.loads((tmp_path / "compare-resnet20.json").read_text(encoding="utf-8"))
    shares = [row["macs_ratio"] for row in content["measurements"]]
    assert shares[0] == 1 > shares[1] == shares[2] > shares[3] == shares[4] > 0
    assert content["protocol"]["data_images"] == 8


@pytest.mark.slow
def test_data_fits_lose_less_of_the_outputs_and_a_budget_is_refitted(tmp_path, capsys):
    options = ["--methods", "lowrank", "dense", "--rank", "budget:0.1", "0.1", "--rounds", "1"]
    options += ["--finetune", "0", "--batch-size", "64", "--data-images", "128"]
    main([*options, "--out", str(tmp_path)])
    content = json.loads((tmp_path / "compare-digits_vgg.json").read_text(encoding="utf-8"))
    rows = {row["label"]: row for row in content["measurements"]}
    assert rows["lowrank 0.1 + data"]["output_error"] < 0.6 * rows["lowrank 0.1"]["output_error"]
    refitted = rows["dense budget:0.1 + data + refit"]
    assert refitted["macs_ratio"] <= 0.1
    assert refitted["accuracy_before"] > rows["lowrank 0.1 + data"]["accuracy_before"]
    assert refitted["weight_error"] is None
    assert "lowrank budget:0.1" not in rows
    text = capsys.readouterr().out
    assert "+ refit: then every chain once more" in text
    assert "budget: one share of the model's MACs" in text


@pytest.mark.slow
def test_weights_alone_when_no_images_are_to_be_used(tmp_path, capsys):
    options = ["--methods", "lowrank", "--rank", "0.5", "--finetune", "0", "--rounds", "1"]
    main([*options, "--batch-size", "4", "--data-images", "0", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert "+ data" not in text
    assert "output error" in text


def test_without_data_there_are_no_accuracies(tmp_path, capsys):
    options = ["--model", "resnet20", "--methods", "lowrank", "--rounds", "1", "--batch-size", "2"]
    main([*options, "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert "resnet20 with random weights on random images" in text
    assert "accuracy" not in text
    assert "+ data" not in text
    assert "output" not in text
    assert (tmp_path / "compare-resnet20.png").exists()


@pytest.mark.slow
def test_a_setting_that_means_nothing_is_left_out_with_the_reason(tmp_path, capsys):
    options = ["--methods", "cp", "lowrank", "--rank", "vbmf", "--finetune", "0", "--rounds", "1"]
    main([*options, "--batch-size", "4", "--data-images", "0", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert "cp vbmf left out: " in text
    assert "steps (%)" not in text


@pytest.mark.slow
def test_the_model_is_not_changed_by_the_comparison():
    job = prepare(build_parser().parse_args([*QUICK, "--methods", "lowrank"]))
    run(job)
    shipped = load_model("digits_vgg").state_dict()
    assert all(torch.equal(shipped[k], v) for k, v in job.model.state_dict().items())


def test_default_settings_are_four_methods_and_vbmf():
    assert choose_settings(None, None) == [
        Setting("cp", "0.1"),
        Setting("cp-separable", "0.1"),
        Setting("tucker2", "0.1"),
        Setting("lowrank", "0.1"),
        Setting("tucker2", "vbmf"),
    ]
    assert choose_settings(["cp"], None) == [Setting("cp", "0.1")]
    assert choose_settings(["tucker2"], ["8", "8"]) == [Setting("tucker2", "8")]


def test_with_data_each_setting_comes_twice_and_a_budget_is_added():
    labels = [setting.label for setting in choose_settings(None, None, data=True)]
    assert labels[:2] == ["cp 0.1", "cp 0.1 + data"]
    assert labels[-3:] == ["tucker2 vbmf", "tucker2 vbmf + data", "auto budget:0.1 + data + refit"]
    assert len(labels) == 11
    assert choose_settings(None, ["8"], data=True)[-1] == Setting("lowrank", "8", data=True)
    assert choose_settings(["dense"], ["budget:0.3"]) == [Setting("dense", "budget:0.3")]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "resnet21"], "unknown model 'resnet21'; there are digits_vgg"),
        (["--model", "torchvision:resnet17"], "no classifier 'resnet17'"),
        (["--model", "resnet20", "--weights", "nowhere.pt"], "no weights file nowhere.pt"),
        (["--model", "resnet20", "--data", "nowhere"], "no folder nowhere/train"),
        (["--model", "resnet20", "--finetune", "5"], "--finetune needs --data"),
        (["--model", "resnet20", "--data-images", "5"], "--data-images needs --data"),
        (["--data-images", "-1"], "expected 0 or more"),
        (["--rank", "budget:2"], "rank 'budget:2': expected"),
        (["--data", "somewhere"], "leave out --data"),
        (["--methods", "cpp"], "unknown method 'cpp'; there are"),
        (["--rank", "half"], "rank 'half': expected"),
        (["--methods", "cp", "--rank", "vbmf", "--data-images", "4"], "nothing to compare"),
        (["--finetune", "-1"], "expected 0 or more"),
        (["--batch-size", "0"], "expected 1 or more"),
        (["--rounds", "many"], "invalid"),
    ],
)
def test_bad_options_end_with_one_clear_line(options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*options, "--rounds", "1"] if "--rounds" not in options else options)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_the_wrong_number_of_classes_is_told(folder, capsys):
    with pytest.raises(SystemExit):
        main(["--model", "resnet20", "--data", str(folder), *QUICK])
    assert "10 classes apart, but" in (error := capsys.readouterr().err)
    assert "2 class folders" in error
