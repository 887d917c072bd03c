"""Reports as text, HTML, JSON and pictures."""

import json
import math
import sys

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.decomposers.registry import get_decomposer, registered
from tdecomp.layers.cost import Cost, count_in_words
from tdecomp.layers.spec import LayerSpec
from tdecomp.plans.report import Report
from tdecomp.plans.row import Row
from tests.models import MODELS


def decomposed(name="cnn", methods=("tucker2", "svd"), rank=0.25, inputs=True):
    case = MODELS[name]
    x = case.inputs() if inputs else None
    return tdecomp.decompose(
        case.build(), methods, rank=rank, example_inputs=x, progress=False
    ).report


def test_the_rows_of_a_report():
    report = decomposed()
    done, left = report["features.3"], report["features.5"]
    assert (done.method, done.rank, done.reason) == ("tucker2", (4, 6), None)
    assert 0 < done.weight_error < 1
    assert done.fit_seconds > 0
    assert done.params_after < done.params_before
    assert done.macs_after < done.macs_before
    assert (left.method, left.rank, left.weight_error, left.fit_seconds) == (None,) * 4
    assert left.reason
    assert (left.params_after, left.macs_after) == (left.params_before, left.macs_before)


def test_the_weight_error_is_that_of_the_chain():
    linear = nn.Linear(20, 16)
    result = tdecomp.decompose(linear, "svd", rank=4, progress=False)
    first, second = (layer.weight.detach() for layer in result.model)
    weight = linear.weight.detach()
    lost = (weight - second @ first).norm() / weight.norm()
    assert result.report[""].weight_error == pytest.approx(float(lost), rel=1e-5)
    squares = torch.linalg.svdvals(weight).square()
    expected = math.sqrt(squares[4:].sum() / squares.sum())
    assert result.report[""].weight_error == pytest.approx(expected, rel=1e-4)


def test_fields_that_do_not_apply_are_none():
    row = decomposed(inputs=False)["features.3"]
    assert (row.macs_before, row.macs_after, row.calls) == (None, None, None)


def test_the_table_as_text():
    text = str(decomposed())
    warning, *lines = text.splitlines()
    assert warning.startswith("warning: errors are of weights")
    assert all(word in lines[0] for word in ("layer", "method", "rank", "params", "MACs", "error"))
    (line,) = [line for line in lines if line.startswith("features.3 ")]
    assert "Conv2d(16→24, 3×3, stride=2, padding=1)" in line
    assert "tucker2" in line
    assert "(4, 6)" in line
    assert "3.48k → " in line
    (line,) = [line for line in lines if line.startswith("features.5 ")]
    assert "—" in line
    assert "depthwise" in line
    assert lines[-2].startswith("left alone: 1, the largest of all MACs: features.5 (")
    assert lines[-1].startswith("6 of 7 layers decomposed; parameters")
    assert "MACs" in lines[-1]


def test_without_inputs_only_parameters_are_shown():
    text = str(decomposed(inputs=False))
    header, last = text.splitlines()[1], text.splitlines()[-1]
    assert "MACs" not in header + last
    assert "params" in header


def test_a_shared_layer_names_its_other_places():
    assert "also again" in str(decomposed("twice", "svd", 2))


def test_the_model_itself_has_a_name_in_the_table():
    assert "(model)" in str(decomposed("linear", "svd", 2))


def test_a_short_representation():
    case = MODELS["cnn"]
    plan = tdecomp.plan(case.build(), "svd", rank=2)
    assert repr(plan) == "<Plan: 2 of 7 layers to be decomposed>"
    report = tdecomp.apply(case.build(), plan, progress=False).report
    assert repr(report) == "<Report: 2 of 7 layers decomposed>"


NASTY = "<b>&\"'</b>"


def nasty():
    return Report([Row(NASTY, (NASTY,), None, 3, 3, reason=f"{NASTY} is left alone")], Cost(0), {})


def test_html_is_escaped():
    html = nasty()._repr_html_()
    assert "<b>" not in html
    assert html.count("&lt;b&gt;&amp;") == 3  # in its row, and where layers are left alone


def test_html_holds_the_same_cells():
    html = decomposed()._repr_html_()
    assert html.count("<tr") == 1 + 7 + 2
    assert "features.3" in html
    assert "(4, 6)" in html
    assert "6 of 7 layers decomposed" in html
    assert html.startswith("<p>warning: errors are of weights")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("inputs", [True, False])
def test_plain_data(name, inputs):
    report = decomposed(name, ("lowrank", "svd"), 2, inputs)
    data = json.loads(report.to_json())
    assert data == json.loads(json.dumps(report.to_dict()))
    assert [row["name"] for row in data["rows"]] == [row.name for row in report]
    for row, plain in zip(report, data["rows"], strict=True):
        assert plain["rank"] == (list(row.rank) if isinstance(row.rank, tuple) else row.rank)
        for field in ("method", "reason", "params_after", "macs_before", "weight_error"):
            assert plain[field] == getattr(row, field)
    for part in ("before", "after", "everything_else"):
        assert data[part] == vars(getattr(report, part))


def test_names_that_do_not_exist():
    with pytest.raises(KeyError, match=r"no Linear or convolution is named 'head\.0'"):
        decomposed()["head.0"]


def test_aliases():
    report = decomposed("twice", "svd", 2)
    assert report["again"] is report["first"]
    assert "again" in report
    assert report["again"].name == "first"
    assert report["again"].names == ("first", "again")


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (1234, "1.23k"),
        (12345, "12.3k"),
        (999_499, "999k"),
        (999_500, "1.00M"),
        (138_357_544, "138M"),
        (15_470_264_320, "15.5G"),
        (4_100_000_000_000, "4.10T"),
    ],
)
def test_counts_have_three_digits(value, text):
    assert count_in_words(value) == text


def test_a_report_of_a_layer_of_unknown_size_still_has_totals():
    rows = [Row("0", ("0",), None, 0, 0, reason="quantized"), Row("1", ("1",), None, 8, 4, 16, 8)]
    report = Report(rows, Cost(0, 32), {})
    assert report.before.params == 8


def test_a_quantized_layer_does_not_take_the_totals_away():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(nn.Linear(16, 16)), {nn.Linear}
        )
    model = nn.Sequential(quantized[0], nn.Linear(16, 16))
    plan = tdecomp.plan(model, "svd", rank=2, example_inputs=torch.zeros(1, 16))
    assert plan.before.macs >= 256


# Pictures ----------------------------------------------------------------------------------------


def pixels(figure, path):
    from matplotlib.image import imread

    figure.savefig(path)
    return imread(path)


def test_a_plot_of_macs_and_errors(tmp_path):
    from matplotlib.figure import Figure

    report = decomposed()
    figure = report.plot()
    assert isinstance(figure, Figure)
    macs, errors = figure.axes
    assert macs.get_xlabel() == "MACs"
    assert [label.get_text() for label in macs.get_yticklabels()] == [r.name for r in report]
    before, *after = ([bar.get_width() for bar in bars] for bars in macs.containers)
    assert before == [row.macs_before for row in report]
    assert [width for bar in after for width in bar] == [row.macs_after for row in report]
    shown = [row.weight_error for row in report if row.weight_error is not None]
    assert [float(line.get_xdata()[0]) for line in errors.lines] == shown
    assert pixels(figure, tmp_path / "report.png").std() > 0


def test_a_plan_shows_the_errors_that_it_expects():
    figure = tdecomp.plan(MODELS["cnn"].build(), "svd", rank=2).plot()
    costs, errors = figure.axes
    assert (costs.get_xlabel(), errors.get_xlabel()) == ("parameters", "expected error")


def of_many(count, timed=False):
    """A report whose first layer has no chain, and whose next ones have all methods in turn."""
    spec, decomposers = LayerSpec(16, 16), {name: get_decomposer(name) for name in registered()}
    rows = []
    for i in range(count):
        name, macs, method = f"layer{i}", 1000 + i, [None, *decomposers][i % (1 + len(decomposers))]
        done = {"reason": "too small"} if method is None else {"method": method, "rank": 2}
        times = {"latency_before": 0.2, "latency_after": 0.1} if timed else {}
        errors = {"output_error": 0.2, "output_error_margin": 0.05} if method else {}
        rows.append(Row(name, (name,), spec, 9, 3, macs, macs // 2, **done, **times, **errors))
    return Report(rows, Cost(0, 0), decomposers)


def test_times_and_output_errors_are_plotted_where_they_are_known():
    costs, times, errors = of_many(8, timed=True).plot().axes
    assert times.get_xlabel() == "measured ms"
    assert [bar.get_width() for bar in times.containers[0]] == [200] * 8
    assert errors.get_xlabel() == "output error"
    assert len(errors.containers) == 7
    legend = [text.get_text() for text in costs.get_figure().legends[0].get_texts()]
    assert legend == ["before", *registered(), "left alone", "output error"]


def test_of_many_layers_the_largest_are_plotted():
    (costs, _) = of_many(200).plot().axes
    shown = [label.get_text() for label in costs.get_yticklabels()]
    assert shown == [*(f"layer{i}" for i in range(168, 200)), "and 168 more"]
    before = sum(range(1000, 1168))
    assert f"{count_in_words(before)} → " in costs.texts[0].get_text()


def test_a_model_of_one_layer_can_be_plotted(tmp_path):
    figure = decomposed("linear", "svd", 2).plot()
    assert figure.axes[0].get_yticklabels()[0].get_text() == "(model)"
    pixels(figure, tmp_path / "one.png")


def test_plotting_opens_no_window_and_changes_no_style():
    import matplotlib

    before = dict(matplotlib.rcParams)
    decomposed("linear", "svd", 2).plot()
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    report = decomposed("linear", "svd", 2)
    monkeypatch.delitem(sys.modules, "tdecomp.pictures.costs", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'tdecomp-torch\[plot\]'"):
        report.plot()
