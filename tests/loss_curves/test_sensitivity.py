"""The table of losses: what a budget chooses from, as text, as data and as a picture."""

import json
import sys

import pytest
import torch
from torch import nn

import tdecomp
from tests.recovery.networks import QUIET, convnet, images, mlp, vectors, whole


def test_its_points_are_the_candidates_of_a_budget():
    model, moments = mlp(), tdecomp.calibrate(mlp(), whole(vectors()), **QUIET)
    table = tdecomp.sensitivity(model, "svd", data=moments, **QUIET)
    plan = tdecomp.plan(model, "svd", rank=tdecomp.Budget(params=0.5), data=moments, **QUIET)
    chosen = [row for row in plan if row.method]
    assert chosen
    for row in chosen:
        points = {point.rank: point for point in table[row.name]["svd"].points}
        assert points[row.rank].error == pytest.approx(row.expected_error, rel=1e-4)
        assert points[row.rank].cost.params == row.params_after


def test_without_data_errors_are_those_of_the_weights():
    model = mlp()
    point = tdecomp.sensitivity(model, "svd", **QUIET)["2"]["svd"].points[3]
    row = tdecomp.decompose(model, "svd", rank={"2": point.rank}, **QUIET).report["2"]
    assert point.error == pytest.approx(row.weight_error, rel=1e-4)


def test_losses_of_a_model_with_tiny_outputs_are_the_same_shares():
    scale, losses = 1e-8, []
    for factor in (1.0, scale):
        model = mlp()
        with torch.no_grad():
            model[4].weight.mul_(factor)
        table = tdecomp.sensitivity(model, "svd", data=vectors(), **QUIET)
        losses.append([[point.loss for point in layer["svd"].points] for layer in table.values()])
    for full, tiny in zip(*losses, strict=True):
        assert tiny == pytest.approx([scale**2 * loss for loss in full], rel=1e-3, abs=0)


def test_as_data_it_says_what_was_computed_and_what_interpolated():
    model, batches = convnet(), images()
    table = tdecomp.sensitivity(
        model, ["lowrank", "cp"], example_inputs=batches[0], data=whole(batches), **QUIET
    )
    data = json.loads(table.to_json())
    assert list(data) == list(table)
    layer = data["3"]
    assert layer["error_of"] == "output"
    assert not any(point["interpolated"] for point in layer["methods"]["lowrank"]["points"])
    points = layer["methods"]["cp"]["points"]
    assert any(p["interpolated"] for p in points) or not points
    assert all(p["macs"] > 0 and p["params"] > 0 for p in points)


def test_as_text_every_layer_has_its_line_with_the_reason_where_there_are_no_losses():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(32, 16))
    text = str(tdecomp.sensitivity(model, "svd", **QUIET))
    assert "depthwise" in text
    assert "svd" in text
    assert "(model)" not in text
    assert text.splitlines()[-1].startswith("relative error of the weight lost")
    assert "at 50%" in text


def test_its_picture_has_a_panel_for_each_layer():
    figure = tdecomp.sensitivity(mlp(), "svd", **QUIET).plot()
    titles = [axis.get_title() for axis in figure.axes if axis.get_visible()]
    assert titles == ["0", "2", "4"]
    for axis in figure.axes:
        if axis.get_visible():
            shares, errors = axis.lines[0].get_data()
            assert 0 < min(shares) <= max(shares) < 1
            assert list(errors) == sorted(errors, reverse=True)


def test_of_many_layers_the_largest_have_a_panel():
    model = nn.Sequential(*(nn.Linear(8, 9 + i) for i in range(30)))
    figure = tdecomp.sensitivity(model, "svd", **QUIET).plot()
    titles = [axis.get_title() for axis in figure.axes if axis.get_visible()]
    assert titles == [str(i) for i in range(6, 30)]
    assert "(the 24 largest of 30 layers)" in figure.get_supxlabel()


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "tdecomp.pictures.curves", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'tdecomp-torch\[plot\]'"):
        tdecomp.sensitivity(mlp(), "svd", **QUIET).plot()


def test_the_model_is_as_it_was():
    model = convnet().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tdecomp.sensitivity(model, "dense", data=images(), **QUIET)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_errors_are_those_of_held_out_samples():
    few, model = vectors(2, 16), mlp()
    moments = tdecomp.calibrate(model, few, **QUIET)
    assert moments.held_out
    table = tdecomp.sensitivity(model, "svd", data=moments, **QUIET)
    points = table["2"]["svd"].points
    for point in (points[0], points[-1]):
        row = tdecomp.decompose(model, "svd", rank={"2": point.rank}, data=moments, **QUIET).report[
            "2"
        ]
        assert point.error == pytest.approx(row.output_error, rel=1e-4)
    plain = tdecomp.sensitivity(model, "svd", data=whole(few), **QUIET)["2"]["svd"].points
    assert [p.rank for p in plain] == [p.rank for p in points]
    assert sum(p.error for p in points) > sum(p.error for p in plain)
