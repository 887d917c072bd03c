import pytest
import torch
from torch import nn

from benchmarks.support.models import load_model
from benchmarks.support.settings import BUDGET, UNIFORM, Setting, plan_of, settings_of
from benchmarks.support.today import TODAY
from tdecomp.decomposers.registry import listed_methods
from tdecomp.model.example import Example
from tdecomp.model.sites import find_sites
from tdecomp.timing.measure import measure
from tests.timing.fake_stopwatch import FakeStopwatch

X = torch.zeros(1, 1, 8, 8)


@pytest.fixture(scope="module")
def model():
    return load_model("digits_vgg")


@pytest.mark.parametrize("method", ["cp", "tucker2", "lowrank", "tensorly-cp"])
@pytest.mark.parametrize("equal", ["macs", "params"])
def test_every_method_comes_close_to_the_share_from_below(model, method, equal):
    plan = plan_of(model, Setting(method, 0.25, equal=equal), X, min_channels=16)
    reached = getattr(plan.after, equal) / getattr(plan.before, equal)
    assert 0.22 < reached <= 0.25
    assert plan["features.0"].method is None  # has one channel


def test_a_budget_is_for_the_whole_model(model):
    plan = plan_of(model, Setting("auto", 0.25, ranks=BUDGET), X, min_channels=16)
    assert plan.after.macs <= 0.25 * plan.before.macs
    assert len({row.method for row in plan}) > 2
    plan = plan_of(
        model, Setting("lowrank", 0.25, ranks=BUDGET, equal="params"), X, min_channels=16
    )
    assert plan.after.params <= 0.25 * plan.before.params


def test_a_share_of_the_time():
    model = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(2)))
    x = torch.zeros(2, 64, 12, 12)
    example, methods = Example.of(x), listed_methods(["lowrank", "svd"])
    sites = list(find_sites(model, None, example).values())
    times = measure(model, example, sites, methods, stopwatch=FakeStopwatch())
    setting = Setting("lowrank", 0.5, ranks=BUDGET, equal="time")
    plan = plan_of(model, setting, x, min_channels=16, profile=times)
    assert 0.4 * plan.before.latency < plan.after.latency <= 0.5 * plan.before.latency


def test_a_share_that_cannot_be_reached_is_told(model):
    with pytest.raises(ValueError, match=r"0.001 of the macs.*the layers that it takes cannot"):
        plan_of(model, Setting("lowrank", 0.001), X, min_channels=16)


def test_settings_are_every_method_at_every_share():
    found = settings_of(
        ["cp", "auto", "tensorly-cp"], [0.5, 0.1], ["weights", "data"], [UNIFORM], "macs"
    )
    assert len(found) == 2 * 2 + 2 * 2 + 2
    assert {s.ranks for s in found if s.method == "auto"} == {BUDGET}
    assert {s.fitted for s in found if s.method in TODAY} == {"weights"}
    both = settings_of(["cp", "tensorly-cp"], [0.5], ["weights"], [UNIFORM, BUDGET], "macs")
    assert [(s.method, s.ranks) for s in both] == [
        ("cp", UNIFORM), ("cp", BUDGET), ("tensorly-cp", UNIFORM)
    ]  # fmt: skip
    timed = settings_of(["cp"], [0.5], ["weights"], [UNIFORM], "time")
    assert timed == [Setting("cp", 0.5, ranks=BUDGET, equal="time")]


def test_linear_layers_are_left_to_svd():
    assert Setting("cp", 0.5).methods == ["cp", "svd"]
    assert Setting("svd", 0.5).methods == "svd"
    assert Setting("auto", 0.5).methods == "auto"
    assert Setting("tensorly-cp", 0.5).methods == ["cp-separable", "svd"]


@pytest.mark.parametrize(
    "methods, shares, message",
    [
        (["cpp"], [0.5], "unknown method 'cpp'; there are svd, .*cp"),
        (["cp"], [1.0], "--shares: expected numbers between 0 and 1, got 1.0"),
    ],
)
def test_bad_settings(methods, shares, message):
    with pytest.raises(ValueError, match=message):
        settings_of(methods, shares, ["weights"], [UNIFORM], "macs")
