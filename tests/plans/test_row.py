"""Rows, plans and reports as plain data, and back."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp import SVD
from tdecomp.layers.geometry import Call
from tdecomp.plans.row import Row
from tests.recovery.networks import QUIET, mlp, vectors


def test_every_row_comes_back_the_same():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    x = torch.randn(2, 8, 6, 6)
    result = tdecomp.decompose(
        model, ["tucker2", "svd"], rank=0.5, example_inputs=x, data=[x], **QUIET
    )
    for row in (*result.report, *result.plan):
        assert Row.from_dict(json.loads(json.dumps(row.to_dict()))) == row


def test_a_report_holds_what_recovery_did():
    result = tdecomp.decompose(mlp(), "svd", rank=4, data=vectors(), recover=["refit"], **QUIET)
    (step,) = result.report.recovery
    (plain,) = json.loads(result.report.to_json())["recovery"]
    assert plain["step"] == "refit"
    assert plain["error_after"] == step.error_after
    assert "model" not in plain


def test_a_plan_of_another_format_says_which_version_wrote_it():
    plan = tdecomp.plan(mlp(), "svd", rank=4, **QUIET)
    for number, words in ((1, r"tdecomp 0\.1.*make it anew"), (3, "update tdecomp")):
        text = json.dumps({**plan.to_dict(), "format": number})
        with pytest.raises(ValueError, match=rf"plan format {number}.*{words}"):
            tdecomp.Plan.from_json(text)


def test_a_method_that_its_options_cannot_rebuild_is_named():
    @dataclass(frozen=True)
    class Held(tdecomp.SVD):
        name = "held"
        with_tensor: object = None

    class Bare(tdecomp.LowRank):
        name = "bare"

        def __init__(self, secret=1):
            self.secret = secret

    for method, words in (
        (Held(with_tensor=torch.ones(2)), r"method 'held' cannot be rebuilt.*with_tensor"),
        (Held(with_tensor={1: 2}), r"method 'held' cannot be rebuilt"),
    ):
        plan = tdecomp.plan(mlp(), method, rank=4, **QUIET)
        with pytest.raises(ValueError, match=words):
            plan.to_json()
    plan = tdecomp.plan(nn.Conv2d(8, 8, 3), Bare(secret=2), rank=4, **QUIET)
    with pytest.raises(ValueError, match=r"method 'bare' cannot be rebuilt"):
        plan.to_json()


def test_a_note_appears_once():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    plan = tdecomp.plan(model, "svd", rank="breakeven", **QUIET)
    for row in plan:
        assert row.note.count("compared by parameters") == 1
    assert replace(plan["0"]) == plan["0"]


@pytest.mark.usefixtures("own_methods")
def test_a_plan_never_comes_back_as_another_method():
    class Plain(tdecomp.Decomposer):
        name, source = "plain", "here"
        refusal, max_rank, stages = SVD.refusal, SVD.max_rank, SVD.stages

        def __init__(self, k=1):
            self.k = k

        def fit(self, kernel, rank):
            return SVD().fit(kernel, rank)

    @dataclass(frozen=True)
    class Half(SVD):
        pass

    tdecomp.register(Plain)
    model = nn.Linear(32, 32)
    assert tdecomp.plan(model, Plain(), rank=4, **QUIET).to_json()
    for method, words in (
        (Plain(7), "'plain'.*not registered as it is"),
        (Plain(torch.ones(2)), "'plain'.*not registered as it is"),
        (Half(), "name of its own"),
    ):
        with pytest.raises(ValueError, match=words):
            tdecomp.plan(model, method, rank=4, **QUIET).to_json()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"names": ("b", "a")}, r"its names are \('b', 'a'\)"),
        ({"params_before": -1}, "params_before is -1"),
        ({"macs_after": 2**63}, "macs_after is 9223372036854775808"),
        ({"latency_after": -0.5}, r"latency_after is -0\.5"),
        ({"rank": None}, "its method is 'svd', its rank None"),
        ({"calls": (Call(2, (3,)),)}, r"Linear\(16→24\) cannot have been called"),
    ],
)
def test_a_row_that_no_layer_has_is_refused(change, words):
    row = next(iter(tdecomp.plan(mlp(), "svd", rank=4, **QUIET)))
    with pytest.raises(ValueError, match=f"layer '0': {words}"):
        replace(row, **change)


def test_a_layer_has_one_row():
    plain = tdecomp.plan(mlp(), "svd", rank=4, **QUIET).to_dict()
    plain["rows"].append(plain["rows"][0])
    with pytest.raises(ValueError, match="one row for each layer"):
        tdecomp.Plan.from_dict(plain)


def test_what_is_not_finite_is_not_known_in_plain_data(tmp_path):
    layer = nn.Linear(16, 12, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.mul_(1e200)  # its squares overflow
    result = tdecomp.decompose(layer, "svd", rank=4, **QUIET)
    row = replace(result.plan[""], weight_error=float("inf"))
    assert json.loads(json.dumps(row.to_dict(), allow_nan=False))["weight_error"] is None
    result.save(tmp_path / "file")
    assert torch.equal(tdecomp.load(tmp_path / "file", layer)[0].weight, result.model[0].weight)
