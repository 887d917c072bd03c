"""Drawings of chains: well-formed, with every stage, its channels, its cost and every rank."""

import re
import sys
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.decomposers.registry import get_decomposer
from tdecomp.layers.cost import chain_cost, count_in_words
from tdecomp.layers.geometry import Call
from tdecomp.layers.spec import LayerSpec
from tests.models import MODELS

SVG = "{http://www.w3.org/2000/svg}"
CONVOLUTION = nn.Conv2d(32, 48, 3, stride=2, padding=1)
RANKS = {
    "svd": (8, ["rank 8"]),
    "lowrank": (8, ["rank 8"]),
    "spatial": (8, ["rank 8"]),
    "tucker2": ((8, 12), ["rank 8", "rank 12"]),
    "cp": (20, ["rank 20"] * 2),
    "cp-separable": (20, ["rank 20"] * 3),
    "tt": (8, []),
}
LINEAR = ("svd", "tt")


def words(drawing):
    return [text.text for text in ElementTree.fromstring(str(drawing)).iter(f"{SVG}text")]


@pytest.mark.parametrize("method", RANKS)
def test_every_stage_and_rank_is_shown(method):
    layer = nn.Linear(32, 48) if method in LINEAR else CONVOLUTION
    rank, marks = RANKS[method]
    size = None if method in LINEAR else (14, 14)
    call = Call(1, size or ())
    spec = LayerSpec.of(layer)
    shown = words(tdecomp.draw(layer, method, rank, size=size))
    assert [word for word in shown if word.startswith("rank")] == marks
    for stage in get_decomposer(method).stages(spec, rank):
        assert f"{stage.in_channels} → {stage.out_channels}" in shown
        assert f"{count_in_words(stage.params)} parameters" in shown
        assert f"{count_in_words(stage.macs(call))} MACs" in shown
        call = Call(1, stage.output_size(call.size))
    whole = chain_cost((spec,), (Call(1, size or ()),))
    assert f"{count_in_words(whole.macs)} MACs" in shown


def test_bars_are_as_long_as_the_costs():
    root = ElementTree.fromstring(str(tdecomp.draw(nn.Linear(100, 100, bias=False), "svd", 10)))
    thin = [r for r in root.iter(f"{SVG}rect") if r.get("stroke-width") == "0.8"]
    layer, *chain = (float(rect.get("width")) for rect in thin)
    assert chain == pytest.approx([0.1 * layer, 0.1 * layer], rel=1e-3)


def test_a_reader_of_the_screen_is_told_what_it_shows():
    drawing = tdecomp.draw(CONVOLUTION, "tucker2", (8, 12))
    root = ElementTree.fromstring(drawing.svg)
    named = {part.get("id"): part.text for part in root if part.get("id")}
    title, description = (named[mark] for mark in root.get("aria-labelledby").split())
    assert root.get("role") == "img"
    assert title == drawing.title
    assert "its chain by tucker2, rank (8, 12)" in title
    assert "32 → 8" in description
    other = tdecomp.draw(CONVOLUTION, "tucker2", (8, 13))
    assert not set(named) & set(re.findall(r'id="(.*?)"', other.svg)), "both may be on one page"


def test_without_a_size_parameters_are_compared():
    shown = words(tdecomp.draw(CONVOLUTION, "lowrank", 4))
    assert not any("MACs" in word for word in shown)
    assert "stride 2" in shown


def test_groups_and_depthwise_layers_are_named():
    shown = words(tdecomp.draw(nn.Conv2d(32, 32, 3, groups=4), "cp", 3))
    assert "4 groups" in shown
    assert "depthwise" in shown
    assert "rank 3 × 4" in shown


def test_a_chain_knows_all_about_itself():
    result = tdecomp.decompose(nn.Sequential(nn.Linear(16, 16)), "svd", rank=4, progress=False)
    assert str(tdecomp.draw(result.model[0])) == str(tdecomp.draw(nn.Linear(16, 16), "svd", 4))


def test_rows_of_reports_and_plans_are_drawn():
    case = MODELS["cnn"]
    x = case.inputs()
    plan = tdecomp.plan(case.build(), "lowrank", rank=0.25, example_inputs=x)
    report = tdecomp.apply(case.build(), plan, example_inputs=x, progress=False).report
    drawing = report.draw("features.3")
    assert str(plan.draw("features.3")) == str(drawing)
    assert f"{count_in_words(report['features.3'].macs_after)} MACs" in str(drawing)
    assert "features.3: Conv2d(16→24" in drawing.title
    with pytest.raises(ValueError, match=r"'features\.5' is left alone"):
        report.draw("features.5")


class Mine(tdecomp.SVD):
    name = "mine<&"


def test_a_method_that_is_not_registered_is_drawn_by_its_report():
    model = nn.Sequential(nn.Linear(16, 16))
    report = tdecomp.decompose(model, Mine(), rank=4, progress=False).report
    assert any("mine<&" in word for word in words(report.draw("0")))


def test_a_drawing_is_saved_and_shown_in_a_notebook(tmp_path):
    drawing = tdecomp.draw(nn.Linear(16, 16), "svd", 4)
    drawing.save(tmp_path / "chain.svg")
    assert (tmp_path / "chain.svg").read_text(encoding="utf-8") == drawing._repr_svg_()
    assert repr(drawing) == f"<Drawing: {drawing.title}>"
    with pytest.raises(ValueError, match=r"expected a file name in \.svg"):
        drawing.save(tmp_path / "chain.png")


@pytest.mark.parametrize(
    "layer, method, rank, size, message",
    [
        (nn.Linear(8, 8), None, None, None, "expected a method and a rank"),
        (nn.Linear(8, 8), "tucker2", 2, None, "svd takes Linear layers"),
        (nn.Linear(8, 8), "svd", 99, None, "at most 8"),
        (nn.Conv2d(8, 8, 3), "cp", 2, (7,), r"no input of size \(7,\)"),
        (nn.Conv2d(8, 8, 3), "cp", 2, (2, 2), r"expected 2 sizes large enough"),
        (nn.Conv2d(8, 8, 3), "cp", 2, 14, "no input of size 14; expected 2 sizes"),
        (nn.ReLU(), "svd", 2, None, "expected a layer of a known kind"),
    ],
)
def test_what_cannot_be_drawn_is_refused(layer, method, rank, size, message):
    with pytest.raises((TypeError, ValueError), match=message):
        tdecomp.draw(layer, method, rank, size=size)


def test_drawing_needs_no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert tdecomp.draw(torch.nn.Linear(8, 8), "svd", 2)
