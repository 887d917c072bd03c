import csv
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.compare import main, of_table, prepare, run
from benchmarks.support.compare_options import build_parser
from benchmarks.support.models import load_model
from benchmarks.support.networks import ResNet20
from benchmarks.support.rows import ORIGINAL

QUICK = ["--rounds", "1", "--batch-size", "16", "--images", "32"]
FEW = ["--methods", "svd", "tensorly-tucker", "--shares", "0.5", "0.25"]


def rows_of(folder, name="own"):
    with (folder / f"compare-{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def own(model_file, tmp_path):
    """Compares the small model of a file, and returns the rows."""

    def compared(*options):
        main(["--model", str(model_file), *QUICK, "--out", str(tmp_path), *options])
        return rows_of(tmp_path)

    return compared


def test_a_model_of_a_file_gives_a_tidy_row_for_each_run(own, tmp_path, capsys):
    rows = own(*FEW, "--recover", "none", "refit", "--finetune", "0", "3", "--seeds", "0", "1")
    # For each seed the original twice, svd on weights and on data, with and without recovery and
    # fine-tuning, and TensorLy's as it is and fine-tuned, all at two shares.
    assert len(rows) == 2 * (2 + 2 * 2 * 2 * 2 + 2 * 2)
    assert len({tuple(list(row.values())[:16]) for row in rows}) == len(rows)
    assert {row["reason"] for row in rows} == {""}
    for row in rows:
        share = float(row["share"])
        assert share - 0.12 < float(row["macs_share"]) <= share
        assert float(row["time_share"]) > 0
        assert 0 <= float(row["quality"]) <= 100
        assert row["torch"] == torch.__version__
        assert row["cpu"]
    assert json.loads((tmp_path / "compare-own.json").read_text())[0]["method"] == ORIGINAL
    text = capsys.readouterr().out
    assert "accuracy (%), after refit, then 3 steps of fine-tuning" in text
    assert " ± " in text
    for suffix in (".md", ".tex", "-quality.svg", "-output-error.svg", "-time-share.svg"):
        assert (tmp_path / f"compare-own{suffix}").stat().st_size > 0


def test_steps_of_recovery_follow_each_other(own):
    options = ["--methods", "svd", "--shares", "0.25", "--fitted", "weights", "--finetune", "0"]
    rows = own(*options, "--recover", "none", "refit", "refit+recalibrate_batchnorm")
    errors = [float(row["output_error"]) for row in rows[1:]]
    assert errors[1] < errors[0]
    assert errors[2] == errors[1]  # this model has no batch norm


def test_the_original_is_fine_tuned_too_and_not_changed_before(own):
    rows = own(*FEW, "--finetune", "0", "20")
    (before, after) = [row for row in rows if row["method"] == ORIGINAL]
    assert float(before["output_error"]) == 0
    assert float(after["output_error"]) > 0


def test_a_network_is_decomposed_once_for_all_that_follows(own):
    steps = ["--recover", "none", "refit", "--finetune", "0", "3"]
    rows = own("--methods", "svd", "--shares", "0.5", *steps)
    # A second decomposition, or recovery, would have taken another time.
    seconds = {(row["method"], row["fitted"], row["recover"], row["seconds"]) for row in rows}
    assert len(rows) == 2 * len(seconds) == 2 * (1 + 2 * 2)


def test_rows_that_are_there_are_not_computed_again(own, tmp_path):
    file = tmp_path / "compare-own.csv"
    first = own(*FEW, "--finetune", "0")
    lines = file.read_text().splitlines(keepends=True)
    marked = [line.replace(",accuracy (%),", ",was kept,") for line in lines]
    file.write_text("".join(marked[:4]) + marked[4][:70])  # stopped while it wrote the fourth
    again = own(*FEW, "--finetune", "0", "--resume")
    assert [row["measure"] for row in again] == ["was kept"] * 3 + ["accuracy (%)"] * 4
    exact = ("method", "share", "fitted", "macs", "quality", "output_error")
    assert [[row[x] for x in exact] for row in again] == [[row[x] for x in exact] for row in first]


def test_other_weights_are_another_network(own, model_file):
    few = ["--methods", "svd", "--shares", "0.5", "--fitted", "weights", "--finetune", "0"]
    first = own(*few)
    # Of another size: one of the same size and second, Python takes for what it compiled before.
    model_file.write_text(model_file.read_text().replace("seed(0)", "seed(10)"))
    again = own(*few, "--resume")
    assert first[1]["weights"] != again[-1]["weights"]
    assert first[1]["output_error"] != again[-1]["output_error"]


def test_what_failed_or_was_not_begun_is_tried_again(own, tmp_path):
    file = tmp_path / "compare-own.csv"
    file.touch()  # stopped before the first row
    few = ["--methods", "svd", "--shares", "0.5", "--fitted", "weights", "--finetune", "0"]
    rows = own(*few, "--resume")
    header, original, svd = file.read_text().splitlines()
    cells = svd.split(",")
    cells[header.split(",").index("reason")] = "MemoryError"
    file.write_text("\n".join([header, original, ",".join(cells)]) + "\n")
    assert own(*few, "--resume")[-1]["reason"] == rows[-1]["reason"] == ""


def test_without_resume_all_is_computed_again(own, tmp_path):
    own(*FEW, "--finetune", "0")
    own("--methods", "svd", "--shares", "0.5", "--fitted", "weights", "--finetune", "0")
    assert len(rows_of(tmp_path)) == 2


def test_tables_of_rows_that_are_there(own, tmp_path, capsys):
    own(*FEW, "--finetune", "0")
    said = capsys.readouterr().out.split("written:")[0]
    tables = (tmp_path / "compare-own.md").read_text()
    (tmp_path / "there").mkdir()
    main(["--tables", str(tmp_path / "compare-own.csv"), "--out", str(tmp_path / "there")])
    assert capsys.readouterr().out.split("written:")[0] == said
    assert (tmp_path / "there" / "compare-own.md").read_text() == tables
    with pytest.raises(SystemExit):
        main(["--tables", "nowhere.csv"])
    assert "nowhere.csv: expected rows that this command wrote, got none" in capsys.readouterr().err


def test_tables_are_of_one_comparison(own, tmp_path):
    own(*FEW, "--finetune", "0")
    file = tmp_path / "compare-own.csv"
    text = file.read_text()
    header, *lines = text.splitlines(keepends=True)
    file.write_text(text + lines[-1].replace("tensorly-tucker,weights", "svd,weights"))
    own_rows = of_table(file)
    assert len(own_rows) == len(lines)  # the line that is there twice counts once
    where = header.split(",").index("batch_size")
    cells = lines[-1].split(",")
    cells[where] = "64"
    file.write_text(text + ",".join(cells))
    with pytest.raises(ValueError, match="one comparison, got batch_size of 16 and 64; keep one"):
        of_table(file)


def test_what_was_there_is_kept_beside(own, tmp_path):
    own("--methods", "svd", "--shares", "0.5", "--finetune", "0")
    before = (tmp_path / "compare-own.csv").read_text()
    own("--methods", "svd", "--shares", "0.25", "--finetune", "0")
    assert (tmp_path / "compare-own.csv.old").read_text() == before


def test_a_metric_that_is_no_number_is_a_reason(own, model_file, capsys):
    model_file.write_text(model_file.read_text() + "def metric(model): return float('nan')\n")
    with pytest.raises(SystemExit):
        own("--methods", "svd", "--shares", "0.5", "--finetune", "0")
    assert "metric(model) gave nan; expected a finite number" in capsys.readouterr().err


def test_a_method_that_fails_is_a_row_with_a_reason(own, capsys):
    rows = own("--methods", "svd", "--shares", "0.01", "0.5", "--fitted", "weights")
    failed = [row for row in rows if row["share"] == "0.01"]
    assert len(failed) == 2
    assert {row["reason"].partition(":")[0] for row in failed} == {"ValueError"}
    assert {row["quality"] for row in failed} == {""}
    assert all(row["quality"] for row in rows if row["share"] != "0.01")
    assert "svd at 0.01 left out: ValueError: svd at 0.01 of the macs" in capsys.readouterr().out


def test_a_metric_of_the_users_own(own, model_file):
    model_file.write_text(model_file.read_text() + "def metric(model): return -5.0\n")
    rows = own("--methods", "svd", "--shares", "0.5", "--finetune", "0", "--fitted", "weights")
    assert [(row["measure"], row["quality"]) for row in rows] == [("metric", "-5.0")] * 2


def test_equal_parameters(own):
    rows = own("--methods", "svd", "--shares", "0.5", "--finetune", "0", "--equal", "params")
    assert 0.4 < float(rows[1]["params_share"]) <= 0.5
    assert {row["equal"] for row in rows[1:]} == {"params"}


@pytest.mark.slow
def test_the_default_model_brings_its_data(tmp_path, capsys):
    options = ["--methods", "lowrank", "auto", "plain-svd", "--shares", "0.25", "--finetune", "0"]
    main([*options, "--rounds", "1", "--images", "128", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert "digits_vgg on handwritten digits, judged on 540 samples" in text
    assert "left out" not in text
    rows = {(row["method"], row["fitted"]): row for row in rows_of(tmp_path, "digits_vgg")}
    error = {name: float(row["output_error"]) for name, row in rows.items()}
    assert float(rows[ORIGINAL, "weights"]["quality"]) >= 98
    assert error["lowrank", "data"] < error["lowrank", "weights"]
    assert error["auto", "data"] < error["lowrank", "data"]
    assert error["plain-svd", "weights"] == pytest.approx(error["lowrank", "weights"], rel=1e-3)


@pytest.mark.slow
def test_a_users_own_weights_and_images(folder, tmp_path, capsys):
    save_file(ResNet20(classes=10).state_dict(), tmp_path / "w.safetensors")
    for split in ("train", "val"):
        for i in range(8):  # ten classes in all, as the network has
            shutil.copytree(folder / split / "red", folder / split / f"red{i}")
    options = ["--model", "resnet20", "--weights", str(tmp_path / "w.safetensors")]
    options += ["--data", str(folder), "--methods", "lowrank", "--shares", "0.75", "0.5"]
    main([*options, *QUICK, "--finetune", "0", "2", "--out", str(tmp_path)])
    assert "resnet20 on colours, judged on 20 samples" in capsys.readouterr().out
    rows = rows_of(tmp_path, "resnet20")
    assert {row["weights"].split()[0] for row in rows} == {"w.safetensors"}
    assert {row["val_images"] for row in rows} == {"20"}


def test_without_data_there_are_costs_only(tmp_path, capsys):
    options = ["--model", "resnet20", "--methods", "lowrank", "--shares", "0.5"]
    main([*options, "--rounds", "1", "--batch-size", "2", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert "resnet20 with random weights on random images" in text
    assert "accuracy" not in text
    assert "output" not in text
    assert (tmp_path / "compare-resnet20-time-share.svg").exists()
    assert not (tmp_path / "compare-resnet20-quality.svg").exists()


def test_the_model_is_not_changed_by_the_comparison(tmp_path):
    options = ["--methods", "lowrank", "--shares", "0.5", "--finetune", "1"]
    job = prepare(build_parser(None).parse_args([*QUICK, *options]))
    run(job, tmp_path / "rows.csv", resume=False)
    shipped = load_model("digits_vgg").state_dict()
    assert all(torch.equal(shipped[k], v) for k, v in job.subject.model.state_dict().items())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "resnet21"], "unknown model 'resnet21'; there are digits_vgg"),
        (["--model", "torchvision:resnet17"], "no classifier 'resnet17'"),
        (["--model", "timm:resnet17"], "timm has no model 'resnet17'"),
        (["--model", "nowhere.py"], "no file nowhere.py"),
        (["--model", "resnet20", "--weights", "nowhere.pt"], "no weights file nowhere.pt"),
        (["--model", "resnet20", "--data", "nowhere"], "no folder nowhere/train"),
        (["--model", "resnet20", "--finetune", "5"], "--finetune needs --data"),
        (["--model", "resnet20", "--fitted", "data"], "--fitted needs --data"),
        (["--model", "resnet20", "--recover", "refit"], "--recover needs --data"),
        (["--recover", "refitt"], "unknown step 'refitt'; there are none, refit"),
        (["--data", "somewhere"], "leave out --data"),
        (["--methods", "cpp"], "unknown method 'cpp'; there are"),
        (["--shares", "2"], "--shares: expected numbers between 0 and 1"),
        (["--shares", "half"], "invalid"),
        (["--finetune", "-1"], "expected 0 or more"),
        (["--batch-size", "0"], "expected 1 or more"),
        (["--rounds", "many"], "invalid"),
    ],
)
def test_bad_options_end_with_one_clear_line(options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(options)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_nothing_to_compare(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*QUICK, "--methods", "cp", "--shares", "0.0001", "--out", str(tmp_path)])
    assert "nothing to compare" in capsys.readouterr().err


def test_the_wrong_number_of_classes_is_told(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--model", "resnet20", "--data", str(folder), *QUICK, "--out", str(tmp_path)])
    assert "10 classes apart, but" in (error := capsys.readouterr().err)
    assert "2 class folders" in error
