"""A stream that carries out a plan."""

import pytest
from safetensors.torch import load_file

import tdecomp
from tests.streaming.folders import SINGLE, perceptron, unknown

SAY_ALL = {"include": "*", "progress": False}


@pytest.fixture
def folder(tmp_path):
    unknown(tmp_path / "large")
    return tmp_path / "large"


@pytest.fixture
def plan(folder):
    chosen = tdecomp.plan(folder, ["svd", "tt"], rank=tdecomp.Energy(0.8), **SAY_ALL)
    return chosen.edit("4", rank=3).edit("2", method="tt", rank=2).without({"0": "kept"})


def test_it_has_the_bits_of_applying_the_plan(folder, plan, tmp_path):
    read = tdecomp.Plan.from_json(plan.to_json())
    report = tdecomp.stream(folder, tmp_path / "small", read, progress=False)
    expected = tdecomp.apply(perceptron(), plan, progress=False)
    got = load_file(tmp_path / "small" / SINGLE)
    state = expected.model.state_dict()
    assert got.keys() == state.keys()
    assert all(got[name].equal(value) for name, value in state.items())
    assert [(row.method, row.rank) for row in report] == [(None, None), ("tt", 2), ("svd", 3)]
    assert report["0"].reason == "kept"
    assert [row.weight_error for row in report] == [
        row.weight_error for row in expected.report
    ]  # fmt: skip


def test_another_plan_is_another_job(folder, plan, tmp_path):
    done = tdecomp.stream(folder, tmp_path / "small", plan, progress=False)
    again = tdecomp.stream(folder, tmp_path / "small", plan, progress=False)
    assert [row.rank for row in again] == [row.rank for row in done]
    with pytest.raises(ValueError, match=r"another job, which differs in rank: .*the plan"):
        tdecomp.stream(folder, tmp_path / "small", plan.edit("4", rank=2), progress=False)


@pytest.mark.parametrize("beside", [{"rank": 4}, {"include": "4"}, {"exclude": ["4"]}])
def test_a_plan_says_everything(folder, plan, tmp_path, beside):
    with pytest.raises(ValueError, match=r"expected no rank, include or exclude beside it"):
        tdecomp.stream(folder, tmp_path / "small", plan, progress=False, **beside)
    assert not (tmp_path / "small").exists()


def test_plans_of_other_models_and_no_rank_at_all(folder, tmp_path):
    other = tdecomp.plan(perceptron()[:3], "svd", rank=4, progress=False)
    with pytest.raises(ValueError, match="layer '4': the model has it, the plan does not"):
        tdecomp.stream(folder, tmp_path / "small", other, progress=False)
    with pytest.raises(ValueError, match=r"rank: expected a positive int.*got None"):
        tdecomp.stream(folder, tmp_path / "small", "svd", progress=False)
