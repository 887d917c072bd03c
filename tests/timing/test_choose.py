"""Budgets in time and the guard, on a machine whose times are known."""

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp import Budget, Plan
from tdecomp.model.example import Example
from tests.unchanged import unchanged

QUIET = {"progress": False}


@pytest.fixture
def planned(profiled):
    def make(model, x, rank, methods="dense", **options):
        times = profiled(model, x, methods)
        return tdecomp.plan(
            model, methods, rank=rank, example_inputs=x, profile=times, **QUIET, **options
        )

    return make


@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_the_budget_is_met_and_used(stopwatch, profiled, model, x, share):
    result = tdecomp.decompose(
        model,
        "dense",
        rank=Budget(latency=share),
        example_inputs=x,
        profile=profiled(model, x),
        **QUIET,
    )
    measured = result.report.speed.measured.median
    before, after = (stopwatch.whole(m, Example(x)) for m in (model, result.model))
    assert measured == pytest.approx(after / before)
    assert measured <= share * 1.02
    assert measured >= share * 0.8  # of so few layers and ranks
    assert result.report.speed.predicted == pytest.approx(measured)
    assert result.report.speed.budget == share


@pytest.mark.parametrize("in_model", [0.7, 1.5])
def test_the_choice_is_corrected_by_what_the_model_takes(stopwatch, planned, model, x, in_model):
    stopwatch.in_model = in_model  # chains alone tell nothing of this
    plan = planned(model, x, Budget(latency=0.5))
    assert plan.speed.predicted <= 0.5 * 1.02
    assert plan.speed.predicted >= 0.5 * 0.8


def test_what_no_layer_takes_is_part_of_the_budget(stopwatch, planned, model, x):
    layers = stopwatch.whole(model, Example(x))
    stopwatch.rest = layers  # half of the model's time
    plan = planned(model, x, Budget(latency=0.75))
    assert plan.speed.predicted <= 0.75 * 1.02
    assert plan.everything_else.latency == pytest.approx(layers, rel=1e-6)
    with pytest.raises(ValueError, match=r"latency=0.45 cannot be met: the least is 0\.5"):
        planned(model, x, Budget(latency=0.45))


def test_beside_macs_and_parameters(planned, model, x):
    plan = planned(model, x, Budget(latency=0.6, macs=0.4, params=0.5))
    assert plan.after.macs <= 0.4 * plan.before.macs
    assert plan.after.params <= 0.5 * plan.before.params
    assert plan.speed.predicted <= 0.6 * 1.02
    tight = planned(model, x, Budget(latency=0.3, macs=0.9))
    assert tight.speed.predicted <= 0.3 * 1.02


def test_several_methods_lose_no_more_than_one(planned, model, x):
    def lost(plan):
        return sum(row.expected_error or 0.0 for row in plan)

    every, one = (planned(model, x, Budget(latency=0.5), m) for m in ("dense", ["lowrank", "svd"]))
    assert {row.method for row in one} <= {None, "lowrank", "svd"}
    assert lost(every) <= lost(one) * 1.05


def test_ranks_are_multiples(planned, model, x):
    plan = planned(model, x, Budget(latency=0.5, round_to=8))
    for row in plan:
        for rank in row.rank if isinstance(row.rank, tuple) else (row.rank,):
            assert rank is None or rank % 8 == 0 or rank == 3  # the first has three channels
    plan = planned(model, x, Budget(macs=0.7, round_to=32), ["lowrank"])
    assert {row.rank for row in plan} == {None, 32}


def test_rows_have_both_times(stopwatch, planned, model, x):
    plan = planned(model, x, Budget(latency=0.5))
    spec, call = plan["2"].layer, plan["2"].calls[0]
    assert plan["2"].latency_before == pytest.approx(stopwatch.chain((spec,), call))
    for row in plan:
        if row.method is None:
            assert row.latency_after == row.latency_before
        else:
            stages = plan.decomposers[row.method].stages(row.layer, row.rank)
            assert row.latency_after == pytest.approx(stopwatch.chain(stages, row.calls[0]))
    assert "ms" in str(plan)


def test_a_plan_in_time_is_plain_data(planned, model, x):
    plan = planned(model, x, Budget(latency=0.5))
    again = Plan.from_json(plan.to_json())
    assert again.to_dict() == plan.to_dict()
    assert again.speed == plan.speed
    edited = plan.edit("2", method="lowrank", rank=5)
    assert edited["2"].latency_after is None
    assert edited.speed.predicted is None
    result = tdecomp.apply(model, plan, example_inputs=x, **QUIET)
    assert result.report.speed.predicted == plan.speed.predicted
    assert result.report.speed.measured.median > 0  # on this machine
    assert result.report["2"].latency_after == plan["2"].latency_after


class TestOnlyIfFaster:
    def test_slower_chains_are_left_alone_with_both_times(self, stopwatch, planned, model, x):
        stopwatch.per_layer = 2e-2  # so that nothing pays
        plan = planned(model, x, 0.25, only_if_faster=True)
        assert all(row.method is None for row in plan)
        assert "slower: lowrank at rank 16 takes" in plan["2"].reason
        assert "ms against the layer's" in plan["2"].reason
        assert plan.speed.predicted == 1.0

    def test_for_every_selector(self, stopwatch, planned, model, x):
        for rank in (0.25, "breakeven", {"*": 4}, tdecomp.Energy(0.5), Budget(macs=0.5)):
            stopwatch.per_layer = 2e-6
            quick = planned(model, x, rank, ["lowrank", "svd"], only_if_faster=True)
            for row in quick:
                assert row.method is None or row.latency_after < row.latency_before
        assert any(row.method for row in quick)

    def test_a_budget_is_spent_elsewhere(self, planned, model, x):
        first = planned(model, x, Budget(macs=0.5), only_if_faster=True)
        assert first.after.macs <= 0.5 * first.before.macs

    def test_what_cannot_be_told_is_left_alone(self, stopwatch, planned, model, x):
        stopwatch.chain_scatter = 0.9
        plan = planned(model, x, 0.5, only_if_faster=True)
        assert "not measurably faster" in plan["2"].reason
        assert "scatters from" in plan["2"].reason

    def test_without_the_guard_they_are_taken(self, stopwatch, profiled, model, x):
        stopwatch.per_layer = 2e-2
        result = tdecomp.decompose(
            model,
            ["lowrank"],
            rank=Budget(macs=0.5),
            example_inputs=x,
            profile=profiled(model, x, ["lowrank"]),
            **QUIET,
        )
        assert result.report.speed.measured.median > 1
        assert "SLOWER than the original" in result.report.summary()


class TestLayouts:
    def test_the_result_has_the_layout_that_it_was_planned_for(self, stopwatch, profiled, model, x):
        stopwatch.slow_layouts = {"contiguous": 3.0}
        times = profiled(model, x, layouts=("contiguous", "channels_last"))
        result = tdecomp.decompose(
            model,
            "dense",
            rank=Budget(latency=0.5),
            example_inputs=x,
            profile=times,
            **QUIET,
        )
        speed = result.report.speed
        # Not a third of a half: the original, too, is faster in the other layout.
        assert (speed.layout_before, speed.layout) == ("channels_last", "channels_last")
        assert 0.4 <= speed.measured.median <= 0.51
        kernels = [p for p in result.model.parameters() if p.dim() == 4 and min(p.shape) > 1]
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)

    def test_in_place(self, profiled, model, x):
        times = profiled(model, x, layouts=("channels_last",))
        result = tdecomp.decompose(
            model,
            "dense",
            rank=Budget(latency=0.5),
            example_inputs=x,
            profile=times,
            inplace=True,
            **QUIET,
        )
        assert result.model is model
        kernels = [p for p in model.parameters() if p.dim() == 4 and min(p.shape) > 1]
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


class TestRefused:
    @pytest.mark.parametrize(
        "options", [{"rank": Budget(latency=0.5)}, {"rank": 0.5, "only_if_faster": True}]
    )
    def test_no_inputs(self, model, options):
        with pytest.raises(ValueError, match="got no example_inputs"):
            tdecomp.plan(model, "dense", **options, **QUIET)

    def test_a_profile_that_is_a_path(self, model, x):
        with pytest.raises(TypeError, match=r"profile: expected a Profile, got 'p\.json'.*load"):
            tdecomp.plan(model, "dense", rank=0.5, example_inputs=x, profile="p.json", **QUIET)

    def test_a_profile_without_inputs(self, profiled, model, x):
        times = profiled(model, x)
        with pytest.raises(ValueError, match="got no example_inputs"):
            tdecomp.plan(model, "dense", rank=0.5, profile=times, **QUIET)

    def test_below_the_fastest_possible(self, planned, model, x):
        with pytest.raises(ValueError, match=r"latency=0.01 cannot be met: the least is 0\.\d+"):
            planned(model, x, Budget(latency=0.01))

    def test_noise(self, stopwatch, planned, model, x):
        stopwatch.scatter = 0.8
        with pytest.raises(ValueError, match=r"times scatter by .*made on noise"):
            planned(model, x, Budget(latency=0.7))

    @pytest.mark.parametrize("wrong", [0, 1.5, True, "half"])
    def test_shares(self, wrong):
        with pytest.raises(ValueError, match="latency above 0 and at most 1"):
            Budget(latency=wrong)

    @pytest.mark.parametrize("wrong", [0, 1.5, True, "8"])
    def test_multiples(self, wrong):
        with pytest.raises(ValueError, match="round_to to be a whole number"):
            Budget(macs=0.5, round_to=wrong)


def test_a_real_machine():
    wide = nn.Sequential(nn.Conv2d(64, 256, 3), nn.ReLU(), nn.Conv2d(256, 256, 3)).eval()
    images = torch.zeros(1, 64, 24, 24)
    with unchanged(wide):
        result = tdecomp.decompose(
            wide, ["lowrank"], rank=0.1, example_inputs=images, only_if_faster=True, **QUIET
        )
    for row in result.report:
        if row.method is not None:
            assert row.latency_after < row.latency_before
    assert result.report.speed.measured.median > 0


def test_what_a_selector_answers_is_checked_with_times_too(planned, model, x):
    class Nothing(tdecomp.RankSelector):
        def select(self, sites, rest=None):  # noqa: ARG002
            return []

    with pytest.raises(TypeError, match=r"Nothing\.select: expected a list of \d+ Choice objects"):
        planned(model, x, Nothing())
