"""Embeddings tied to output layers: one factorization, one choice, one parameter, as before."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional

import tdecomp
from tdecomp.layers.lookup_chain import EmbeddingChain, HeadChain

QUIET = {"progress": False}
IDS = torch.arange(18).reshape(2, 9) * 5 % 70


class Tied(nn.Module):
    """A language model whose head has the weight of its table."""

    def __init__(self, rows=70, width=16, bias=True, **options):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.tokens = nn.Embedding(rows, width, **options)
            self.body, self.head = nn.Linear(width, width), nn.Linear(width, rows, bias=bias)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        return self.head(torch.relu(self.body(self.tokens(ids))))


def data():
    generator = torch.Generator().manual_seed(0)
    often = 1 / torch.arange(1.0, 71)
    return [torch.multinomial(often, 9, True, generator=generator).reshape(1, 9) for _ in range(60)]


def is_tied(model):
    return model.tokens[0].weight is model.head[-1].weight


def count(model):
    return sum(p.numel() for p in model.parameters())


WAYS = {
    "rank": {"rank": 5},
    "macs": {"rank": tdecomp.Budget(macs=0.6), "example_inputs": IDS},
    "params": {"rank": tdecomp.Budget(params=0.6)},
    "the table's name": {"rank": {"tokens": 5}},
    "the head's name": {"rank": {"head": 5}},
    "data": {"rank": 5, "data": data(), "example_inputs": IDS},
    "in place": {"rank": 5, "inplace": True},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_they_share_one_factorization(way):
    model = Tied(padding_idx=0)
    before = count(model)
    result = tdecomp.decompose(model, "auto", **QUIET, **way)
    tokens, head = result.model.tokens, result.model.head
    assert (type(tokens), type(head)) == (EmbeddingChain, HeadChain)
    assert is_tied(result.model)
    assert tokens.rank == head.rank
    report = result.report
    assert (report.before.params, report.after.params) == (before, count(result.model))
    assert "shares its factors with 'tokens'" in report["head"].remarks
    assert "fitted as 'head'" in report["tokens"].remarks
    a = tokens[0].weight
    torch.testing.assert_close(tokens(IDS), functional.embedding(IDS, a @ tokens[1].weight.T))
    x = torch.randn(3, 16)
    torch.testing.assert_close(head(x), x @ head[0].weight.T @ a.T + head[1].bias)
    if "data" not in way:  # both are the best for the same weight
        torch.testing.assert_close(tokens[1].weight.T, head[0].weight, rtol=1e-3, atol=1e-4)
    assert not tokens(torch.tensor([0])).any() or model.tokens.weight[0].any()


def test_the_padding_of_a_tied_table_is_zero_in_the_shared_factor():
    for given in ({}, {"data": data()}):
        model = Tied(padding_idx=2).double()
        found = tdecomp.decompose(model, "svd", rank=5, **given, **QUIET).model
        assert not found.tokens[0].weight[2].any()
        found(IDS).square().sum().backward()
        assert found.tokens[0].weight.grad is not None


def test_the_table_gets_the_best_factor_for_the_rows_that_are_read():
    batches = data()
    result = tdecomp.decompose(Tied(), "svd", rank=5, data=batches, **QUIET)
    tokens, head = result.model.tokens, result.model.head
    ids = torch.cat(batches).flatten()
    wanted, rows = Tied().tokens(ids).detach(), tokens[0](ids).detach()
    own, the_heads = rows @ tokens[1].weight.detach().T, rows @ head[0].weight.detach()
    lost = [float((found - wanted).square().sum()) for found in (own, the_heads)]
    assert lost[0] < 0.999 * lost[1]
    row = result.report["tokens"]
    assert 0 < row.output_error < 1
    plain = tdecomp.decompose(Tied(), "svd", rank=5, **QUIET).report["tokens"]
    assert row.weight_error > plain.weight_error


def test_at_full_rank_they_are_the_model():
    model = Tied().double()
    result = tdecomp.decompose(model, "svd", rank=16, allow_expansion=True, **QUIET)
    torch.testing.assert_close(result.model(IDS), model(IDS))


def test_saved_loaded_copied_cast_and_trained_they_stay_tied(tmp_path):
    result = tdecomp.decompose(Tied(), "svd", rank=5, **QUIET)
    result.save(tmp_path / "tied.safetensors")
    loaded = tdecomp.load(tmp_path / "tied.safetensors", Tied())
    for model in (loaded, copy.deepcopy(result.model), copy.deepcopy(loaded).double()):
        assert is_tied(model)
        assert count(model) == count(result.model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(IDS).square().sum().backward()
        before = model.tokens[0].weight.clone()
        optimizer.step()
        assert is_tied(model)
        assert not torch.equal(before, model.head[-1].weight)
    again = tdecomp.apply(Tied(), tdecomp.Plan.from_json(result.plan.to_json()), **QUIET)
    assert is_tied(again.model)
    torch.testing.assert_close(again.model(IDS), result.model(IDS))


def test_an_optimizer_has_each_factor_once():
    model = Tied()
    optimizer = torch.optim.Adam(model.named_parameters())
    tdecomp.decompose(model, "svd", rank=5, inplace=True, optimizers=optimizer, **QUIET)
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_in_place_is_undone_on_an_error():
    model = Tied()
    state, layers = copy.deepcopy(model.state_dict()), [model.tokens, model.head]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["params"] = ()  # which nothing can be put into
    with pytest.raises(TypeError), pytest.warns(UserWarning, match="no optimizer had these"):
        tdecomp.decompose(model, "svd", rank=5, inplace=True, optimizers=optimizer, **QUIET)
    assert [model.tokens, model.head] == layers
    assert model.head.weight is model.tokens.weight
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_a_plan_changes_them_together():
    plan = tdecomp.plan(Tied(), "svd", rank=5, **QUIET)
    for name in ("tokens", "head"):
        edited = plan.edit(name, rank=3)
        assert edited["tokens"].rank == edited["head"].rank == 3
        result = tdecomp.apply(Tied(), edited, **QUIET)
        assert result.report.after.params == count(result.model)
    with pytest.raises(ValueError, match="tucker2 takes"):
        plan.edit("head", method="tucker2")


def test_a_plan_that_treats_them_differently_is_refused():
    plan = json.loads(tdecomp.plan(Tied(), "svd", rank=5, **QUIET).to_json())
    row = next(row for row in plan["rows"] if row["name"] == "head")
    row["rank"] = 3
    with pytest.raises(ValueError, match=r"'head': planned svd at rank 3, and 'tokens'.*rank 5"):
        tdecomp.Plan.from_json(json.dumps(plan))
    row |= {"rank": None, "method": None, "reason": "by hand"}
    with pytest.raises(ValueError, match="expected one choice for both"):
        tdecomp.Plan.from_json(json.dumps(plan))


def test_a_plan_of_a_tied_model_is_not_for_one_that_is_not():
    plan = tdecomp.plan(Tied(), "svd", rank=5, **QUIET)
    untied = Tied()
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    first, other = plan["head"].tied_to, "its weight is its own"
    with pytest.raises(ValueError, match=f"{other} in the model, tied to that of {first!r} in"):
        tdecomp.apply(untied, plan, **QUIET)
    plan = tdecomp.plan(untied, "svd", rank=5, **QUIET)
    with pytest.raises(ValueError, match=f"tied to that of {first!r} in the model, its own in"):
        tdecomp.apply(Tied(), plan, **QUIET)


@pytest.mark.parametrize("data", [None, data()], ids=["weights", "data"])
def test_lower_ranks_keep_the_tie(data):
    result = tdecomp.decompose(Tied(), "svd", rank=8, **QUIET)
    with torch.no_grad():
        result.model.tokens[1].weight.mul_(2.0)  # as training might
    lower = tdecomp.reduce_ranks(result, rank=4, data=data, **QUIET)
    assert is_tied(lower.model)
    assert lower.report.after.params == count(lower.model)
    w = lower.model.tokens[0].weight @ lower.model.tokens[1].weight.T
    wanted = result.model.tokens[0].weight @ result.model.tokens[1].weight.T
    assert (w - wanted).norm() < 0.8 * wanted.norm()


def test_recovery_keeps_the_tie():
    steps = ["refit", "reconstruct", tdecomp.Distill(steps=2)]
    result = tdecomp.decompose(Tied(), "svd", rank=5, data=data(), recover=steps, **QUIET)
    assert is_tied(result.model)
    assert "it shares a factor with an embedding" in str(result.report)


# Who cannot follow --------------------------------------------------------------------------------


class Reads(Tied):
    def forward(self, ids):
        return super().forward(ids) + self.tokens.weight.sum()


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 4


def with_own_forward():
    model = Tied()
    model.tokens.__class__ = Scaled
    return model


def with_another_kind():
    model = Tied(70, 70)
    model.extra = nn.Bilinear(1, 70, 70)
    model.extra.weight = nn.Parameter(torch.zeros(70, 70))
    model.extra.weight = model.tokens.weight
    return model


def with_a_tied_bias():
    model = Tied()
    model.other = nn.Linear(16, 70)
    model.other.bias = model.head.bias
    return model


STAY = {
    "own forward": (with_own_forward, {}),
    "max_norm": (lambda: Tied(max_norm=1.0), {}),
    "another kind": (with_another_kind, {}),
    "a bias": (with_a_tied_bias, {}),
    "excluded": (Tied, {"exclude": "head"}),
    "not included": (Tied, {"include": ["tokens", "body"]}),
    "read": (Reads, {"example_inputs": IDS}),
    "read with data": (Reads, {"data": [IDS]}),
}


@pytest.mark.parametrize("build, options", STAY.values(), ids=STAY)
def test_where_one_cannot_follow_all_stay(build, options):
    result = tdecomp.decompose(build(), "svd", rank=5, **options, **QUIET)
    reasons = [result.report[name].reason for name in ("tokens", "head")]
    assert all(reasons)
    assert any("is tied: " in reason for reason in reasons)
    assert result.report["body"].method == "svd"
    assert result.model.head.weight is result.model.tokens.weight


def test_linears_alone_stay():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    plan = tdecomp.plan(model, "svd", rank=5, **QUIET)
    assert {row.reason for row in plan} == {"its weight is tied: '0', '1' share it"}


def test_a_layer_that_the_model_fails_with_takes_the_others_with_it():
    class Insists(Tied):
        def forward(self, ids):
            assert type(self.head) is nn.Linear
            return super().forward(ids)

    result = tdecomp.decompose(Insists(), "svd", rank=5, example_inputs=IDS, **QUIET)
    assert result.report["tokens"].method is result.report["head"].method is None
    assert result.report["body"].method == "svd"
    plan = tdecomp.plan(Insists(), "svd", rank=5, **QUIET)
    applied = tdecomp.apply(Insists(), plan, example_inputs=IDS, **QUIET)
    assert applied.report["tokens"].method is applied.report["head"].method is None
    assert applied.report.after.params == count(applied.model)


def test_tables_alone_are_offered_for_parameters():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Embedding(70, 16), nn.Embedding(70, 16)
            self.b.weight = self.a.weight

        def forward(self, ids):
            return self.a(ids) * self.b(ids)

    plan = tdecomp.plan(Two(), "svd", rank=5, **QUIET)
    assert all("a lookup has no MACs" in row.reason for row in plan)
    result = tdecomp.decompose(Two(), "svd", rank=tdecomp.Ratio(0.5, of="params"), **QUIET)
    a, b = result.model.a, result.model.b
    assert [x is y for x, y in zip(a.parameters(), b.parameters(), strict=True)] == [True, True]
    assert (
        result.report.after.params == count(result.model) == sum(p.numel() for p in a.parameters())
    )


def test_sensitivity_and_times_are_those_of_the_output_layer():
    found = tdecomp.sensitivity(Tied(), "svd", example_inputs=IDS, **QUIET)
    assert found["tokens"].reason == "shares its factors with 'head'"
    ranks = [point.rank for point in found["head"]["svd"].points]
    assert ranks[0] == 1
    plan = tdecomp.plan(Tied(), "svd", rank=ranks[-1], example_inputs=IDS, **QUIET)
    cost = found["head"]["svd"].points[-1].cost
    assert cost.params == sum(plan[name].params_after for name in ("tokens", "head"))
    assert cost.macs == sum(plan[name].macs_after for name in ("tokens", "head"))
    times = tdecomp.profile(Tied(), IDS, "svd", effort="quick", **QUIET)
    plan = tdecomp.plan(Tied(), "svd", rank=4, example_inputs=IDS, profile=times, **QUIET)
    assert plan["head"].latency_after > 0


def test_two_ranks_for_one_weight_are_refused():
    with pytest.raises(ValueError, match="'tokens', 'head' share one weight"):
        tdecomp.plan(Tied(), "svd", rank={"tokens": 5, "head": 3}, **QUIET)
    plan = tdecomp.plan(Tied(), "svd", rank={"tokens": 5, "head": 5}, **QUIET)
    assert plan["tokens"].rank == plan["head"].rank == 5


def test_a_table_of_another_size_is_not_saved(tmp_path):
    result = tdecomp.decompose(Tied(), "svd", rank=5, **QUIET)
    table = result.model.tokens
    table.weight.data = torch.cat([table[0].weight.data, torch.ones(3, 5)])
    with pytest.raises(ValueError, match="layer 'tokens': its stages have other sizes"):
        result.save(tmp_path / "resized.safetensors")
