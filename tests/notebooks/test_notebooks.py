"""Every notebook runs and its story holds; the first one on torchvision's ResNet-18, too."""

import json
from pathlib import Path

import nbformat
import pytest

from notebooks.execute import FOLDER, run

FIRST = FOLDER / "01_decompose_a_pretrained_vgg.ipynb"
SECOND = FOLDER / "02_one_budget.ipynb"
THIRD = FOLDER / "03_compare_cp_tucker_lowrank.ipynb"
FOURTH = FOLDER / "04_your_own_method.ipynb"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 600_000  # bytes
# Appended to the notebook: what its variables hold at the end.
PROBE = """
import json

print(json.dumps({
    "model": MODEL,
    "layers": [[row.method, row.macs_before, row.macs_after] for row in result.report],
    "reasons": [row.reason for row in plan if row.method is None],
    "answers": answers,
    "edited": [edited[layer].method, edited[layer].rank, edited_result.report[layer].method],
    "bit_equal": bit_equal,
}))
"""
SECOND_PROBE = """
import json

print(json.dumps({
    "seen": sorted(moments),
    "layers": [row.name for row in plan],
    "fits": fits,
    "kept": [p.report.after.macs / p.report.before.macs for p, _, _ in steps.values()],
    "errors": [[r.error_before, r.error_after, d.error_after] for _, r, d in steps.values()],
    "comparison": comparison,
    "original": measure(model),
}))
"""
THIRD_PROBE = """
import json

print(json.dumps({
    "comparison": comparison,
    "times": [latency.ratio for latency in latencies.values()],
    "mixed": mixed,
}))
"""
FOURTH_PROBE = """
import json

print(json.dumps({
    "registered": tdecomp.registered(),
    "whole": errors,
    "lost": lost,
    "comparison": comparison,
    "plan": [row.method for row in plan],
    "bit_equal": bit_equal,
}))
"""


def execute(path, probe=PROBE, **environment):
    """The notebook's outputs, and the values of its variables that the probe prints."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(probe, id="probe"))
    run(notebook, environment)
    probed = notebook.cells.pop()
    return notebook, json.loads(probed.outputs[0].text)


def outputs(notebook):
    return [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]


def pictures(notebook):
    return [o for o in outputs(notebook) if "image/png" in o.get("data", {})]


def assert_clean(notebook):
    """Neither a traceback nor a warning, nor a bar: all of them go to standard error."""
    kinds = {o.output_type for o in outputs(notebook)}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert [o.text for o in outputs(notebook) if o.get("name") == "stderr"] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_tidy_and_has_its_outputs(path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert len(text) < LARGEST
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert set(notebook.metadata.language_info) == {"name"}
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert_clean(notebook)
    assert pictures(notebook)
    for folder in (str(Path.home()), str(FOLDER.parent), "site-packages", "/tmp/"):
        assert folder not in text


def test_no_notebook_is_missing_here():
    assert [FIRST, SECOND, THIRD, FOURTH] == NOTEBOOKS


@pytest.mark.slow
def test_the_first_notebook_runs_on_the_shipped_network_where_weights_cannot_be_had():
    notebook, values = execute(FIRST, TDECOMP_NOTEBOOK_WEIGHTS="nowhere.safetensors")
    assert_clean(notebook)
    assert len(pictures(notebook)) == 2
    assert values["model"] == "digits_vgg"

    changed = [layer for layer in values["layers"] if layer[0] is not None]
    assert {method for method, _, _ in changed} == {"tucker2", "svd"}
    assert all(after < before for _, before, after in changed)
    assert len(values["reasons"]) == len(values["layers"]) - len(changed) == 2
    assert all("narrower than where=at_least" in reason for reason in values["reasons"])

    answers = values["answers"]
    assert answers["original"] > 0.97
    assert answers["fitted to data, refit"] >= answers["fitted to the weights"]
    for name in ("fitted to the weights, fine-tuned", "fitted to data, refit, fine-tuned"):
        assert answers[name] > answers["original"] - 0.03

    assert values["edited"] == ["lowrank", 16, "lowrank"]
    assert values["bit_equal"] is True


@pytest.mark.slow
def test_the_first_notebook_runs_on_torchvisions_resnet18():
    notebook, values = execute(FIRST, TDECOMP_NOTEBOOK_WEIGHTS="random")
    assert_clean(notebook)
    assert len(pictures(notebook)) == 2
    assert values["model"] == "torchvision:resnet18"
    assert len(values["layers"]) == 21
    assert values["answers"]["original"] == 1.0  # its own answers count as right
    assert values["bit_equal"] is True


@pytest.mark.slow
def test_the_second_notebook_runs_and_its_story_holds():
    notebook, values = execute(SECOND, SECOND_PROBE)
    assert_clean(notebook)
    assert len(pictures(notebook)) == 4
    assert values["seen"] == sorted(values["layers"])

    for by_weights, by_data in zip(values["fits"][::2], values["fits"][1::2], strict=True):
        assert by_weights["rank"] == by_data["rank"]
        assert by_data["output error"] < by_weights["output error"]
        assert by_data["weight error"] > by_weights["weight error"]

    assert all(kept <= share for kept, share in zip(values["kept"], [0.1, 0.05, 0.03], strict=True))
    for before, refitted, distilled in values["errors"]:
        assert refitted < 0.1 * before
        assert distilled <= refitted

    lost = {}
    for point in values["comparison"]:
        lost.setdefault(point["line"], []).append(point["outputs lost"])
    assert len(lost) == 5
    assert all(len(points) == 3 for points in lost.values())
    for refitted, rough in zip(
        lost["one budget + refit"], lost["uniform, by weights"], strict=True
    ):
        assert refitted < 0.2 * rough
    best = [p for p in values["comparison"] if p["line"] == "one budget + refit + distill"]
    assert all(point["accuracy"] > values["original"] - 0.04 for point in best)


@pytest.mark.slow
def test_the_third_notebook_runs_and_its_story_holds():
    notebook, values = execute(THIRD, THIRD_PROBE)
    assert_clean(notebook)
    assert len(pictures(notebook)) == 2

    errors = {}
    for point in values["comparison"]:
        assert point["MACs"] <= point["share"] + 0.02
        key = point["method"], point["share"]
        errors.setdefault(point["stage"], {})[key] = point["output error"]
    by_weights, by_data, recovered = errors.values()
    assert len(by_weights) == 12
    for key, error in by_weights.items():
        assert recovered[key] < by_data[key]
        assert by_data[key] < error or error > 1.0  # else too little is left for any fit
    assert values["mixed"]["output error"] < min(
        recovered[key] for key in recovered if key[1] == 0.05
    )
    assert len(values["times"]) == 13
    assert min(values["times"]) > 0


@pytest.mark.slow
def test_the_fourth_notebook_runs_and_its_story_holds():
    notebook, values = execute(FOURTH, FOURTH_PROBE)
    assert_clean(notebook)
    assert len(pictures(notebook)) == 1
    assert values["registered"][-2:] == ["pointwise-first", "pointwise-first-fitted"]
    assert all(error < 1e-5 for error in values["whole"].values())
    assert values["lost"]["pointwise-first-fitted"] < values["lost"]["pointwise-first"]
    assert len(values["comparison"]) == 9
    for point in values["comparison"]:
        assert point["fitted to data, refit"] < point["fitted to data"]
    assert values["bit_equal"] is True
