"""Words of the command line as values."""

import argparse

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.ranks.ratio import Ratio
from tdecomp.streaming.command import arguments


@pytest.mark.parametrize(
    "text, nbytes",
    [
        ("1B", 1),
        ("500MB", 500_000_000),
        ("4gb", 4_000_000_000),
        ("4 GB", 4_000_000_000),
        ("1.5GiB", 3 * 2**29),
        ("2KiB", 2048),
    ],
)
def test_sizes(text, nbytes):
    assert arguments.memory_size(text) == nbytes


@pytest.mark.parametrize("text", ["4", "", "GB", "-1GB", "0GB", "4G", "1e3MB", "4 GB left", "iB"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="with its unit, such as 500MB"):
        arguments.memory_size(text)


def test_devices():
    assert arguments.device("cpu") == torch.device("cpu")
    for text in ("none", "cuda:9999", ""):
        with pytest.raises(ValueError, match=f"device '{text}' cannot be used here: "):
            arguments.device(text)


def test_counts():
    assert arguments.count("12") == 12
    for text in ("0", "-1", "1.5", "", "two", "1" * 5000):
        with pytest.raises(ValueError, match="at least 1, got"):
            arguments.count(text)


def test_ranks_of_some_layers():
    assert arguments.layer_rank("*.up=ratio:0.5,of=params") == ("*.up", Ratio(0.5, of="params"))
    for text in ("*.up", "=8", "*.up="):
        with pytest.raises(ValueError, match=r"name or a glob|neither a number"):
            arguments.layer_rank(text)


def test_methods():
    assert [method.name for method in arguments.methods("svd,tt")] == ["svd", "tt"]
    assert [method.name for method in arguments.methods("auto")] == [*tdecomp.registered()]
    for text in ("", "svd,", "svd,svd", "svd,none"):
        with pytest.raises(ValueError, match="method"):
            arguments.methods(text)


def test_plans(tmp_path):
    plan = tdecomp.plan(nn.Sequential(nn.Linear(8, 8)), "svd", rank=2, progress=False)
    (tmp_path / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    assert arguments.plan_in(str(tmp_path / "plan.json")).rows == plan.rows
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json: plan: "):
        arguments.plan_in(str(tmp_path / "other.json"))
    with pytest.raises(FileNotFoundError, match=r"no such file: .*none\.json"):
        arguments.plan_in(str(tmp_path / "none.json"))


def test_files_that_can_be_written(tmp_path):
    assert arguments.new_file(str(tmp_path / "new")) == tmp_path / "new"
    for place in (tmp_path, tmp_path / "none" / "file"):
        with pytest.raises(ValueError, match="in a folder that exists"):
            arguments.new_file(str(place))


def test_errors_keep_their_words():
    with pytest.raises(argparse.ArgumentTypeError, match="with its unit"):
        arguments.readable(arguments.memory_size)("4")
    with pytest.raises(argparse.ArgumentTypeError, match="no such file"):
        arguments.readable(arguments.plan_in)("none.json")
