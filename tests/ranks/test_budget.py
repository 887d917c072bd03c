"""One budget for the whole model: met, used, and spent where it saves most."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tdecomp
from tdecomp import Budget, Plan
from tdecomp.layers.cost import Cost
from tdecomp.ranks.base import NOTHING, Candidate, Option
from tests.geometries import case
from tests.models import MODELS, torch_macs
from tests.ranks.brute_force import problems
from tests.recovery.networks import QUIET, convnet, images, mlp, vectors
from tests.unchanged import unchanged

# Choices made by hand ------------------------------------------------------------------------


def candidate(layer, method, before, options):
    """A method with the given (params, macs, loss) at rank 1, 2, …"""
    listed = tuple(
        Option(rank, Cost(params, macs), loss, loss)
        for rank, (params, macs, loss) in enumerate(options, 1)
    )
    return Candidate(
        layer,
        method,
        len(listed),
        Cost(*before),
        lambda rank: listed[rank - 1].cost,
        lambda: None,
        lambda: listed,
    )


@st.composite
def choices_of_layers(draw, most_layers=5, most_options=4):
    """Layers with one or two methods; costs grow with the rank, and losses fall."""
    sites = []
    for i in range(draw(st.integers(1, most_layers))):
        before = draw(st.tuples(st.integers(20, 400), st.integers(20, 400)))
        methods = []
        for method in "ab"[: draw(st.integers(1, 2))]:
            count = draw(st.integers(1, most_options))
            columns = [sorted(draw(st.lists(st.integers(1, 600), min_size=count, max_size=count)))
                       for _ in range(2)]  # fmt: skip
            losses = draw(st.lists(st.floats(0, 10), min_size=count, max_size=count))
            options = zip(*columns, sorted(losses, reverse=True), strict=True)
            methods.append(candidate(f"l{i}", method, before, options))
        sites.append(methods)
    return sites


def outcome(sites, choices, names=("params", "macs")):
    """What a choice costs and loses."""
    spent, lost = dict.fromkeys(names, 0), 0.0
    for choice, site in zip(choices, sites, strict=True):
        cost = site[0].before
        if choice.candidate is not None:
            option = choice.candidate.options()[choice.rank - 1]
            cost, lost = option.cost, lost + option.loss
        for name in names:
            spent[name] += getattr(cost, name)
    return spent, lost


def enumerated(sites):
    """Every way to choose, as (params, macs, loss)."""
    sums = np.zeros((1, 3))
    for site in sites:
        before = site[0].before
        mine = [(before.params, before.macs, 0.0)]
        for method in site:
            mine += [
                (o.cost.params, o.cost.macs, o.loss)
                for o in method.options()
                if o.cost.amount < before.amount
            ]
        sums = (sums[:, None] + np.array(mine)).reshape(-1, 3)
    return sums


SHARES = st.one_of(st.none(), st.floats(0.05, 1.0))


@given(choices_of_layers(), SHARES, SHARES)
def test_what_brute_force_finds(sites, params, macs):
    if params is None and macs is None:
        macs = 0.5
    budget = Budget(params=params, macs=macs)
    whole = {n: sum(getattr(s[0].before, n) for s in sites) for n in ("params", "macs")}
    named = {n: share for n, share in (("params", params), ("macs", macs)) if share is not None}
    everything = enumerated(sites)
    fits = np.ones(len(everything), bool)
    for i, name in enumerate(("params", "macs")):
        if name in named:
            fits &= everything[:, i] <= named[name] * whole[name]
    if not fits.any():
        with pytest.raises(ValueError, match="cannot be met"):
            budget.select(sites)
        return
    best = everything[fits][:, 2].min()
    choices = budget.select(sites)
    spent, lost = outcome(sites, choices)
    assert all(spent[name] <= share * whole[name] for name, share in named.items())
    assert lost <= 1.0001 * best + 1e-9
    assert budget.least_loss(sites) <= best + 1e-9


def test_fifty_plans_lose_least_of_all_plans_there_are():
    """`make soak` makes a hundred times as many."""
    found = [problem for seed in range(10) for problem in problems(seed)]
    assert len(found) == 50
    assert not any(found), "\n".join(filter(None, found))


@given(choices_of_layers(most_layers=12, most_options=6), st.floats(0.05, 1.0), st.floats(1.0, 2.0))
def test_a_larger_budget_never_loses_more(sites, share, more):
    try:
        small = outcome(sites, Budget(macs=share).select(sites))[1]
    except ValueError:
        return
    large = outcome(sites, Budget(macs=min(1.0, share * more)).select(sites))[1]
    assert large <= 1.1 * small + 1e-9


@given(choices_of_layers(most_layers=8), st.sampled_from(["params", "macs"]), st.integers(0, 5000))
def test_the_least_that_can_be_reached_is_named_and_can_be(sites, name, rest):
    rest = Cost(rest, rest)
    whole = getattr(rest, name) + sum(getattr(s[0].before, name) for s in sites)
    with pytest.raises(ValueError, match=rf"Budget: {name}=1e-06 cannot be met: the least is") as e:
        Budget(**{name: 1e-6}).select(sites, rest)
    least = float(str(e.value).split("the least is ")[1].split()[0])
    spent, _ = outcome(sites, Budget(**{name: min(least, 1.0)}).select(sites, rest))
    assert spent[name] + getattr(rest, name) <= least * whole
    assert "methods='auto'" in str(e.value)
    if least > 2e-4:
        with pytest.raises(ValueError, match="cannot be met"):
            Budget(**{name: least - 2e-4}).select(sites, rest)


def test_two_budgets_that_cannot_be_met_together():
    """Each alone can: the one method saves parameters, the other one MACs."""
    site = [
        candidate("l0", "a", (1000, 1000), [(100, 950, 1.0)]),
        candidate("l0", "b", (1000, 1000), [(950, 100, 1.0)]),
    ]
    sites = [site, site]
    for budget in (Budget(params=0.2), Budget(macs=0.2), Budget(params=0.6, macs=0.6)):
        spent, _ = outcome(sites, budget.select(sites))
        for name in ("params", "macs"):
            share = getattr(budget, name)
            assert share is None or spent[name] <= share * 2000
    with pytest.raises(
        ValueError,
        match=r"macs=0.2 and params=0.2 cannot be met together: with macs=0.2 the least params "
        r"is 0.9500 of",
    ):
        Budget(params=0.2, macs=0.2).select(sites)
    assert Budget(params=0.95, macs=0.2).select(sites)
    with pytest.raises(ValueError, match=r"macs=0.05 cannot .* 0.1000; params=0.01 .* 0.1000 of"):
        Budget(params=0.01, macs=0.05).select(sites)


@pytest.mark.parametrize("limits", [10, (10, 12), (3, 40)])
def test_ranks_between_the_options_are_used(limits):
    """One small rank to choose; the rest of the budget goes into ranks that no option has."""

    def cost(rank):
        ranks = rank if isinstance(rank, tuple) else (rank,)
        return Cost(30 * sum(ranks), 30 * sum(ranks))

    one = (1, 1) if isinstance(limits, tuple) else 1
    listed = (Option(one, cost(one), 0.5, 0.5),)
    site = [
        Candidate("l0", "a", limits, Cost(1000, 1000), cost, lambda: None, options=lambda: listed)
    ]
    for share in (0.1, 0.2, 0.27):
        (choice,) = Budget(macs=share).select([site])
        used = cost(choice.rank).macs
        assert share * 1000 - 30 < used <= share * 1000


def test_a_layer_that_is_kept_says_what_its_best_chain_loses():
    site = [
        candidate("l0", "a", (1000, 1000), [(100, 100, 3.0), (500, 500, 2.0), (1200, 1200, 0.1)]),
        candidate("l0", "b", (1000, 1000), [(400, 400, 0.25)]),
    ]
    (choice,) = Budget(macs=1.0).select([site])
    kept = "kept as it is, as the budget allows: its best chain (b 1) would "
    assert choice.reason == f"{kept}have the relative error 0.250"
    (choice,) = Budget(macs=1.0).select([[replace(c, by_outputs=True) for c in site]])
    assert choice.reason == f"{kept}lose 25.0% of the output"
    (choice,) = Budget(macs=1.0).select([[candidate("l0", "a", (10, 10), [(20, 20, 1.0)])]])
    assert choice.reason == "kept as it is: no cheaper chain is worth considering"


# Networks --------------------------------------------------------------------------------------


@pytest.fixture
def no_fast_path():
    """The fused kernels of transformers hide from torch's counter."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


METHODS = ["auto", "dense", "svd", ["lowrank", "svd"]]
BUDGETS = [Budget(macs=0.55), Budget(params=0.6), Budget(macs=0.7, params=0.65)]


@pytest.mark.usefixtures("no_fast_path")
@pytest.mark.parametrize("name", ["cnn", "twice", "nested", "tuple", "dict", "linear", "encoder"])
def test_every_budget_is_met_and_one_is_used(name):
    # Each pair of a model, methods and a budget comes up.
    first = sorted(MODELS).index(name)
    for i, methods in enumerate(METHODS):
        budget = BUDGETS[(first + i) % len(BUDGETS)]
        with case(methods, budget):
            check_budget(name, methods, budget)


def check_budget(name, methods, budget):
    model, inputs = MODELS[name].build(), MODELS[name].inputs()
    try:
        with unchanged(model):
            plan = tdecomp.plan(model, methods, rank=budget, example_inputs=inputs, **QUIET)
    except ValueError as error:
        least = max(
            float(part.split()[0].strip(";")) for part in str(error).split("the least is ")[1:]
        )
        budget = Budget(
            **{n: min(1.0, max(least, share)) for n, share in vars(budget).items() if share}
        )
        plan = tdecomp.plan(model, methods, rank=budget, example_inputs=inputs, **QUIET)
    result = tdecomp.apply(model, plan, **QUIET)
    macs, params = (
        torch_macs(result.model, inputs),
        sum(p.numel() for p in result.model.parameters()),
    )
    assert (macs, params) == (plan.after.macs, plan.after.params)
    assert torch_macs(model, inputs) == plan.before.macs
    assert all(row.reason for row in plan if row.method is None)
    left, near = [], []
    for unit, share in vars(budget).items():
        if share is not None:
            whole, now = getattr(plan.before, unit), getattr(plan.after, unit)
            assert now <= share * whole
            near.append(now >= (share - 0.01) * whole)
            left.append((unit, share * whole - now))
    assert any(near) or all(_no_step_fits(row, plan, left) for row in plan if row.method)


def _no_step_fits(row, plan, left):
    """Whether the next rank of the layer is above what is left, or saves nothing."""
    ranks = row.rank if isinstance(row.rank, tuple) else (row.rank,)
    for i in range(len(ranks)):
        raised = tuple(r + (j == i) for j, r in enumerate(ranks))
        try:
            larger = plan.edit(row.name, rank=raised if isinstance(row.rank, tuple) else raised[0])
        except ValueError:  # above the largest
            continue
        extra = {unit: getattr(larger.after, unit) - getattr(plan.after, unit) for unit, _ in left}
        saves = larger[row.name].after.amount < row.before.amount
        if saves and all(extra[unit] <= room for unit, room in left):
            return False
    return True


def test_layers_that_are_kept_say_why():
    model, inputs = convnet(), images()[0]
    plan = tdecomp.plan(model, "auto", rank=Budget(macs=1.0), example_inputs=inputs, **QUIET)
    wanted = r"kept as it is, as the budget allows: its best chain \(\w+ .*\) would have the "
    assert all(re.match(wanted, row.reason) for row in plan)
    assert plan.after == plan.before


def data_for(kind, model, batches):
    if kind == "none":
        return None
    if kind == "batches":
        return batches
    return tdecomp.calibrate(model, batches, gradients=kind == "moments", **QUIET)


@pytest.mark.parametrize("kind", ["none", "batches", "moments", "moments without gradients"])
@pytest.mark.parametrize("methods", ["auto", "dense"])
def test_with_and_without_data(kind, methods):
    model, batches = convnet(), images()
    data = data_for(kind, model, batches)
    expected = []
    for share in (0.3, 0.5, 0.8):
        with unchanged(model):
            plan = tdecomp.plan(
                model, methods, rank=Budget(macs=share), example_inputs=batches[0], data=data,
                **QUIET,
            )  # fmt: skip
        assert plan.after.macs <= share * plan.before.macs
        result = tdecomp.apply(model, plan, data=data, **QUIET)
        for planned, row in zip(plan, result.report, strict=True):
            if planned.method is None:
                continue
            real = row.weight_error if data is None else row.output_error
            if planned.method in ("svd", "lowrank", "spatial") and (
                data is None or planned.method != "spatial"
            ):
                assert planned.expected_error == pytest.approx(real, rel=1e-3, abs=1e-6)
            elif planned.method == "tucker2":
                assert real <= 1.02 * planned.expected_error + 1e-6
            else:
                assert planned.expected_error is not None
        expected.append(sum(row.expected_error or 0.0 for row in plan))
    assert all(math.isfinite(e) for e in expected)


def test_decompose_is_plan_and_apply():
    model, batches = convnet(), images()
    options = {"rank": Budget(macs=0.4), "example_inputs": batches[0], "data": batches, **QUIET}
    plan = tdecomp.plan(model, "dense", **options)
    result = tdecomp.decompose(model, "dense", **options)
    assert [(r.method, r.rank) for r in plan] == [(r.method, r.rank) for r in result.report]
    with unchanged(model):
        inside = tdecomp.decompose(model, "dense", **options).model
    for a, b in zip(inside.parameters(), result.model.parameters(), strict=True):
        assert torch.equal(a, b)


class Partly(nn.Module):
    """A layer that nothing reaches, a transposed one and a grouped one."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(16, 12, 4, stride=2, padding=1)
        self.down = nn.Conv2d(12, 16, 3, padding=1)
        self.never = nn.Linear(32, 32)

    def forward(self, x):
        return self.down(torch.relu(self.up(torch.relu(self.grouped(x)))))


@pytest.mark.parametrize("budget", [Budget(macs=0.4), Budget(params=0.4)], ids=str)
def test_layers_that_no_batch_reaches_transposed_and_grouped_ones(budget):
    torch.manual_seed(0)
    model, batches = Partly(), [torch.randn(8, 8, 6, 6) for _ in range(2)]
    result = tdecomp.decompose(
        model, "auto", rank=budget, example_inputs=batches[0], data=batches, **QUIET
    )
    report = result.report
    for unit, share in vars(budget).items():
        if share is not None:
            assert getattr(report.after, unit) <= share * getattr(report.before, unit)
    assert torch_macs(result.model, batches[0]) == report.after.macs
    if budget.macs is not None:
        assert report["never"].method is None  # it costs none


def test_plans_for_several_budgets_share_their_fits():
    fits = []

    class Counted:
        def fit_to(self, kernel, rank, *args, **kwargs):
            fits.append((self.name, rank))
            return super().fit_to(kernel, rank, *args, **kwargs)

    kinds = (tdecomp.CP, tdecomp.Tucker2, tdecomp.Spatial)
    methods = [type(kind.__name__, (Counted, kind), {})() for kind in kinds]
    model, batches = convnet(), images()
    moments = tdecomp.calibrate(model, batches, **QUIET)

    def plan(share, **options):
        fits.clear()
        made = tdecomp.plan(
            model, methods, rank=Budget(macs=share), example_inputs=batches[0], data=moments,
            **QUIET, **options,
        )  # fmt: skip
        return made, len(fits)

    first, many = plan(0.5)
    again, none = plan(0.5)
    assert many > 0
    assert none == 0
    assert again.to_json() == first.to_json()
    # Curves are known by now; a fit for each layer that gets another rank serves the result.
    assert max(plan(share)[1] for share in (0.15, 0.55, 0.9)) <= 3
    assert plan(0.5, exclude="0")[1] == 0
    # Other weights in the same place are other fits, however they got there.
    with torch.no_grad():
        model[3].weight.data.mul_(torch.linspace(0.1, 2, 3))
    assert plan(0.5)[1] > 0


def test_moments_are_as_they_were(tmp_path):
    model, batches = convnet(), images()
    moments = tdecomp.calibrate(model, batches, **QUIET)
    moments.save(tmp_path / "before")
    tdecomp.plan(
        model, "auto", rank=Budget(macs=0.5), example_inputs=batches[0], data=moments, **QUIET
    )
    moments.save(tmp_path / "after")
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()


def test_a_unit_is_that_of_the_layers_at_hand():
    """A plan with other layers left alone does not find losses in the unit of this one."""
    torch.manual_seed(0)
    model, batches = Partly(), [torch.randn(8, 8, 6, 6)]
    options = {"rank": Budget(params=0.6), "example_inputs": batches[0], **QUIET}
    shared = tdecomp.calibrate(model, batches, **QUIET)
    tdecomp.plan(
        model, "dense", data=shared, exclude="down", **options | {"rank": Budget(params=0.9)}
    )
    fresh = tdecomp.calibrate(model, batches, **QUIET)
    one, other = (tdecomp.plan(model, "dense", data=d, **options) for d in (shared, fresh))
    assert one.to_json() == other.to_json()


def test_a_plan_s_json_keeps_what_is_expected_until_a_row_is_edited():
    model, batches = convnet(), images()
    plan = tdecomp.plan(
        model, "auto", rank=Budget(macs=0.3), example_inputs=batches[0], data=batches, **QUIET
    )
    text = plan.to_json()
    assert Plan.from_json(text).to_json() == text
    data = json.loads(text)
    rows = [row for row in data["rows"] if row["method"]]
    assert all(row["expected_error"] is not None for row in rows)
    rank = rows[0]["rank"]
    rows[0]["rank"] = rank - 1 if isinstance(rank, int) else [rank[0] - 1, rank[1]]
    edited = Plan.from_json(json.dumps(data))
    assert edited[rows[0]["name"]].expected_error is None
    assert edited.loss is None
    for row in rows[1:]:
        assert edited[row["name"]].expected_error == row["expected_error"]
    name = rows[0]["name"]
    assert plan.edit(name, rank=1 if isinstance(rank, int) else (1, 1))[name].expected_error is None


def test_a_plan_says_what_is_lost_beside_a_lower_bound():
    model, batches = convnet(), images()
    options = {"example_inputs": batches[0], "data": batches, **QUIET}
    plan = tdecomp.plan(model, "dense", rank=Budget(macs=0.3), **options)
    assert 0 < 0.8 * plan.loss.chosen < plan.loss.bound <= plan.loss.chosen
    said = f"expected loss {plan.loss.chosen:.3g}, lower bound {plan.loss.bound:.3g}"
    assert plan.summary().endswith(said)
    assert Plan.from_json(plan.to_json()).loss == plan.loss
    assert plan.edit("3", rank=1).loss is None
    assert tdecomp.plan(model, "svd", rank=4, **options).loss is None
    for damaged in ("NaN", '"much"', "{}"):
        data = plan.to_json().replace(json.dumps(plan.loss.bound), damaged)
        with pytest.raises(ValueError, match=r"plan: loss"):
            Plan.from_json(data)


class RoundedUp(Budget):
    """Its bound is off by as much as round-off is, and a little more."""

    def least_loss(self, sites, rest=NOTHING):
        return super().least_loss(sites, rest) + 1e-3


def test_round_off_puts_no_bound_above_what_is_lost():
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40))
    for share in (0.5, 1.0):
        loss = tdecomp.plan(model, "svd", rank=RoundedUp(params=share), **QUIET).loss
        assert 0 <= loss.bound <= loss.chosen


def test_plans_of_huge_losses_can_be_read_back():
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40))
    with torch.no_grad():
        model[0].weight.mul_(1e12)
    data = [torch.randn(64, 40, generator=torch.Generator().manual_seed(0))]
    plan = tdecomp.plan(model, "svd", rank=Budget(params=0.5), data=data, **QUIET)
    assert plan.loss.chosen > 2**63
    assert Plan.from_json(plan.to_json()).loss == plan.loss


def test_what_loses_nothing_near_the_break_even_is_found():
    """A chain of 0.95 of the layer's weights, where every other layer would lose."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(40, 40, bias=False) for _ in range(3)))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(40, 19) @ torch.randn(19, 40))
    plan = tdecomp.plan(model, "svd", rank=Budget(params=0.985), **QUIET)
    assert [row.rank for row in plan] == [None, 19, None]
    assert plan.loss.chosen < 1e-9


def test_cp_is_expected_to_lose_something_known_only_with_a_budget():
    model, batches = convnet(), images()
    for data in (None, batches):
        options = {"example_inputs": batches[0], "data": data, **QUIET}
        fixed = tdecomp.plan(model, "cp", rank=6, **options)
        assert fixed["3"].expected_error is None
        budget = tdecomp.plan(model, "cp", rank=Budget(macs=0.3), **options)
        assert 0 < budget["3"].expected_error < 1
        report = tdecomp.apply(model, budget, data=data, **QUIET).report
        real = report["3"].weight_error if data is None else report["3"].output_error
        assert real == pytest.approx(budget["3"].expected_error, rel=0.3)


# What cannot be -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["macs", "params", "latency"])
def test_shares_that_cannot_be(name):
    for share in (0, 0.0, -0.5, 1.01, 2, math.nan, math.inf, True, "0.5", (0.5,)):
        wanted = rf"expected {name} above 0 and at most 1, .*, got"
        with case(share), pytest.raises(ValueError, match=wanted):
            Budget(**{name: share})


def test_neither():
    with pytest.raises(ValueError, match="expected macs=, params= or latency="):
        Budget()


def test_a_share_of_numpy_or_one():
    assert Budget(macs=np.float32(0.5)).select([]) == []
    assert Budget(params=1).params == 1


def test_macs_need_example_inputs():
    for include in ((), "nothing-*"):
        with pytest.raises(ValueError, match=r"example_inputs.*|include"):
            tdecomp.plan(mlp(), "svd", rank=Budget(macs=0.5), include=include, **QUIET)
    plan = tdecomp.plan(mlp(), "svd", rank=Budget(params=0.5), **QUIET)
    assert plan.after.params <= 0.5 * plan.before.params


@pytest.mark.parametrize("options", [{"methods": "tucker2"}, {"methods": "svd", "exclude": "*"}])
def test_nothing_to_decompose_cannot_save_anything(options):
    model, x = mlp(), vectors()[0]
    methods = options.pop("methods")
    with pytest.raises(ValueError, match=r"macs=0.5 cannot be met: the least is 1.0000"):
        tdecomp.plan(model, methods, rank=Budget(macs=0.5), example_inputs=x, **options, **QUIET)
    with pytest.raises(ValueError, match=r"MACs are counted on example_inputs"):
        tdecomp.plan(model, methods, rank=Budget(macs=0.5), **options, **QUIET)
    for budget in (Budget(macs=1.0), Budget(macs=1.0, params=1.0)):
        plan = tdecomp.plan(model, methods, rank=budget, example_inputs=x, **options, **QUIET)
        assert plan.after == plan.before


def test_a_budget_is_no_rank_of_single_layers():
    with pytest.raises(
        ValueError, match=r"layer '0': Budget\(macs=0.5.*\) is for the whole model.*include="
    ):
        tdecomp.plan(mlp(), "svd", rank={"0": Budget(macs=0.5), "2": 4}, **QUIET)


@pytest.mark.parametrize("share", [1 - 2**-53, 1 - 1e-12, 1 - 1e-6])
def test_a_share_just_below_the_whole_is_met(share):
    plan = tdecomp.plan(nn.Linear(16, 16), "svd", rank=Budget(params=share), **QUIET)
    assert plan.after.params < plan.before.params
