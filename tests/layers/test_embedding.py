"""Lookup tables: a chain gives the rows of the product of its factors, in every mode."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

import tdecomp
from tdecomp.layers.lookup_chain import EmbeddingChain
from tdecomp.layers.spec import LayerSpec

QUIET = {"progress": False}
IDS = torch.tensor([[3, 1, 0, 29], [7, 7, 3, 2]])
OPTIONS = {
    "plain": {},
    "padding": {"padding_idx": 3},
    "by frequency": {"scale_grad_by_freq": True},
    "sparse": {"sparse": True, "padding_idx": 3},
}
each_kind = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def table(rows=30, columns=12, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Embedding(rows, columns, dtype=torch.float64, **options)


def decomposed(layer, rank=5, **options):
    """The chain; the layer is named, as one without MACs has to be."""
    model = nn.ModuleDict({"table": layer})
    return tdecomp.decompose(model, "svd", rank={"table": rank}, **QUIET, **options).model["table"]


def product(chain):
    return chain[0].weight @ chain[1].weight.T


@each_kind
def test_it_looks_up_rows_of_the_product(options):
    layer = table(**options)
    chain = decomposed(layer)
    assert [type(stage) for stage in chain] == [nn.Embedding, nn.Linear]
    torch.testing.assert_close(chain(IDS), functional.embedding(IDS, product(chain)))
    u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    torch.testing.assert_close(product(chain), (u[:, :5] * s[:5]) @ vh[:5])


@each_kind
def test_at_full_rank_it_is_the_layer(options):
    layer = table(**options)
    chain = decomposed(layer, 12, allow_expansion=True)
    torch.testing.assert_close(chain(IDS), layer(IDS))
    for module in (layer, chain):
        module(IDS).square().sum().backward()
    # W = A B: the gradient of A is that of W times Bᵀ.
    mine, its = layer.weight.grad, chain[0].weight.grad
    assert its.is_sparse == layer.sparse
    mine, its = (g.to_dense() if g.is_sparse else g for g in (mine, its))
    torch.testing.assert_close(its, mine @ chain[1].weight)
    if layer.padding_idx is not None:
        assert not its[layer.padding_idx].any()


def test_padding_is_exactly_zero_and_stays_it():
    chain = decomposed(table(padding_idx=3))
    assert not chain[0].weight[3].any()
    assert not chain(torch.tensor([3])).any()
    optimizer = torch.optim.SGD(chain.parameters(), lr=0.1)
    chain(IDS).square().sum().backward()
    optimizer.step()
    assert not chain[0].weight[3].any()


BAGS = {
    "mean": {},
    "sum": {"mode": "sum"},
    "padding": {"mode": "mean", "padding_idx": 3},
    "last offset": {"mode": "sum", "include_last_offset": True},
}


def bag(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.EmbeddingBag(30, 12, dtype=torch.float64, **options)


@pytest.mark.parametrize("options", BAGS.values(), ids=BAGS)
def test_bags_get_all_that_they_are_called_with(options):
    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = bag(**options)

        def forward(self, ids, offsets, weights):
            return self.table(ids, offsets, per_sample_weights=weights)

    ids, offsets = IDS.flatten(), torch.tensor([0, 3, 8])
    summed = options.get("mode") == "sum"
    inputs = (ids, offsets, torch.rand(8, dtype=torch.float64) if summed else None)
    model = Bags()
    result = tdecomp.decompose(
        model, "svd", rank={"table": 12}, example_inputs=inputs, allow_expansion=True, **QUIET
    )
    torch.testing.assert_close(result.model(*inputs), model(*inputs))
    bags = 3 - ("include_last_offset" in options)
    assert result.report["table"].macs_after == bags * 12 * 12
    chain = decomposed(bag(**options))
    weight = product(chain)
    torch.testing.assert_close(
        chain(ids, offsets),
        functional.embedding_bag(ids, weight, offsets, **{"mode": "mean"} | options),
    )


def test_bags_of_rows_as_a_matrix():
    layer = bag(mode="sum")
    plan = tdecomp.plan(layer, "svd", rank={"": 4}, example_inputs=IDS, **QUIET)
    assert plan[""].macs_after == len(IDS) * 4 * 12
    report = tdecomp.decompose(layer, "svd", rank={"": 4}, data=[IDS], **QUIET).report
    assert "no moments of a EmbeddingBag" in report[""].note


class Doubled(nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


@pytest.mark.parametrize(
    "layer, words",
    [
        (nn.Embedding(9, 4, max_norm=1.0), "its max_norm scales rows down"),
        (nn.EmbeddingBag(9, 4, mode="max"), "its mode is 'max'"),
        (Doubled(9, 4), "Doubled overrides forward"),
    ],
    ids=["max_norm", "max", "own forward"],
)
def test_left_alone(layer, words):
    plan = tdecomp.plan(
        nn.Sequential(layer, nn.Linear(4, 4)), "svd", rank=tdecomp.Budget(params=1.0), **QUIET
    )
    assert words in plan["0"].reason


def test_methods_of_other_layers_say_who_takes_it():
    model = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 16))
    plan = tdecomp.plan(model, "tucker2", rank=tdecomp.Ratio(0.5, of="params"), **QUIET)
    assert plan["0"].reason == "tucker2 takes no lookups; svd does"


# Who is offered it --------------------------------------------------------------------------------

SAVES_PARAMS = {
    "ratio": tdecomp.Ratio(0.5, of="params"),
    "budget": tdecomp.Budget(params=0.5),
    "several": tdecomp.Budget(params=0.5, macs=1.0),
    "by name": {"tokens": 3},
    "by glob": {"tok*": tdecomp.Ratio(0.5, of="params")},
}
SAVES_OTHERWISE = {
    "rank": 3,
    "share of ranks": 0.3,
    "macs": tdecomp.Ratio(0.5, of="macs"),
    "budget": tdecomp.Budget(macs=0.9),
    "vbmf": "vbmf",
    "energy": tdecomp.Energy(0.5),
    "by glob": {"*": 3},
}


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(60, 16), nn.Linear(16, 16)

    def forward(self, ids):
        return self.head(torch.relu(self.tokens(ids)))


def plan_of(rank):
    torch.manual_seed(0)
    return tdecomp.plan(Text(), "svd", rank=rank, example_inputs=IDS, **QUIET)


@pytest.mark.parametrize("rank", SAVES_PARAMS.values(), ids=SAVES_PARAMS)
def test_offered_for_parameters(rank):
    row = plan_of(rank)["tokens"]
    assert row.method == "svd"
    assert row.params_after < row.params_before
    assert (row.macs_before, row.macs_after) == (0, IDS.numel() * row.rank * 16)


@pytest.mark.parametrize("rank", SAVES_OTHERWISE.values(), ids=SAVES_OTHERWISE)
def test_not_offered_where_nothing_is_asked_of_parameters(rank):
    plan = plan_of(rank)
    assert plan["tokens"].reason.startswith("a lookup has no MACs: offered for parameters")
    assert plan["head"].reason is None or "no MACs" not in plan["head"].reason


def test_a_glob_that_names_only_lookups_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"'tok\*' names only layers left alone.*no MACs"):
        plan_of({"tok*": 3})


def test_a_chain_with_more_parameters_is_not_made():
    reason = plan_of({"tokens": 16})["tokens"].reason
    assert "would not save parameters: 1,216 against the layer's 960" in reason


def test_its_sensitivity_is_by_parameters():
    found = tdecomp.sensitivity(Text(), "svd", example_inputs=IDS, **QUIET)
    points = found["tokens"]["svd"].points
    assert points[-1].cost.params < 60 * 16 <= points[-1].cost.params + 76
    assert "MACs" in str(found)


# What stands in its place -------------------------------------------------------------------------


def test_it_passes_for_an_embedding():
    chain = decomposed(table(padding_idx=3))
    assert isinstance(chain, nn.Embedding)
    assert isinstance(chain, EmbeddingChain)
    assert tuple(chain.weight.shape) == (30, 5)
    assert chain.weight.data.data_ptr() == chain[0].weight.data_ptr()
    assert (chain.weight.device, chain.weight.dtype) == (torch.device("cpu"), torch.float64)
    found = (chain.num_embeddings, chain.embedding_dim, chain.padding_idx, chain.sparse)
    assert found == (30, 12, 3, False)
    chain.num_embeddings, chain.padding_idx = 40, None
    assert (chain[0].num_embeddings, chain[0].padding_idx) == (40, None)
    assert [*chain.state_dict()] == [*dict(chain.named_parameters())] == ["0.weight", "1.weight"]
    with pytest.raises(ValueError, match="a chain has no parameter 'weight'"):
        chain.weight = nn.Parameter(torch.ones(30, 12))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_whole(copied):
    chain = decomposed(table())
    twin = copied(chain)
    assert twin.weight.data.data_ptr() == twin[0].weight.data_ptr() != chain[0].weight.data_ptr()
    assert torch.equal(twin(IDS), chain(IDS))
    assert (twin.rank, twin.replaced, twin.decomposer) == (5, LayerSpec.of(table()), tdecomp.SVD())


def test_exported_and_cast():
    model = nn.Sequential(nn.Embedding(30, 12), nn.Linear(12, 3))
    result = tdecomp.decompose(model, "svd", rank={"0": 4}, **QUIET)
    wanted = result.model(IDS)
    program = torch.export.export(result.model, (IDS,))
    torch.testing.assert_close(program.module()(IDS), wanted)
    assert result.model.bfloat16()[0].weight.dtype == torch.bfloat16


def test_round_trips(tmp_path):
    model = nn.Sequential(nn.EmbeddingBag(30, 12, mode="sum", padding_idx=2), nn.Linear(12, 3))
    result = tdecomp.decompose(model, "svd", rank={"0": 4}, **QUIET)
    assert str(result.plan["0"].layer) == "EmbeddingBag(30→12, padding_idx=2, mode=sum)"
    again = tdecomp.Plan.from_json(result.plan.to_json())
    assert again.rows == result.plan.rows
    result.save(tmp_path / "bag.safetensors")
    loaded = tdecomp.load(tmp_path / "bag.safetensors", model)
    assert torch.equal(loaded(IDS), result.model(IDS))
    other = nn.Sequential(nn.EmbeddingBag(30, 12, mode="mean"), nn.Linear(12, 3))
    with pytest.raises(ValueError, match="layer '0': got EmbeddingBag"):
        tdecomp.load(tmp_path / "bag.safetensors", other)


def test_specs_of_earlier_versions_have_no_options():
    data = LayerSpec(4, 3).to_dict()
    del data["options"]
    assert LayerSpec.from_dict(data) == LayerSpec(4, 3)
    spec = LayerSpec.of(nn.Embedding(4, 3, padding_idx=1))
    assert LayerSpec.from_dict(spec.to_dict()) == spec


def test_lower_ranks_refits_and_drawings():
    torch.manual_seed(0)
    data = [torch.randint(0, 60, (16, 6)) for _ in range(6)]
    recover = ["refit", "reconstruct"]
    result = tdecomp.decompose(
        Text(), "svd", rank=tdecomp.Budget(params=0.5), data=data, recover=recover, **QUIET
    )
    assert "a lookup gets the same rows as the original's" in str(result.report)
    lower = tdecomp.reduce_ranks(result, rank={"tokens": 2}, data=data, **QUIET)
    assert lower.model.tokens.rank == 2
    assert lower.report["tokens"].output_error < 1
    drawn = str(tdecomp.draw(result.model.tokens))
    assert "Embedding" in drawn
    assert f"{result.report['tokens'].params_after} parameters (" in drawn


def test_times_are_those_of_lookups():
    times = tdecomp.profile(Text(), IDS, "svd", effort="quick", **QUIET)
    plan = tdecomp.plan(
        Text(), "svd", rank={"tokens": 3}, example_inputs=IDS, profile=times, **QUIET
    )
    assert plan["tokens"].latency_before > 0


def test_the_chain_is_saved_by_torch():
    chain, file = decomposed(table()), io.BytesIO()
    torch.save(chain.state_dict(), file)
    file.seek(0)
    twin = decomposed(table(), 5)
    twin.load_state_dict(torch.load(file))
    assert torch.equal(twin(IDS), chain(IDS))


def test_values_of_the_weight_are_not_those_of_the_table():
    chain = decomposed(table())
    for use in (lambda w: w.sum() + torch.ones(1), lambda w: torch.ones(2, 30) @ w):
        with pytest.raises(ValueError, match="needs the values of a decomposed layer's weight"):
            use(chain.weight)

    class Reads(Text):
        def forward(self, ids):
            return super().forward(ids) + self.tokens.weight.mean()

    ratio = tdecomp.Ratio(0.5, of="params")
    for given in ({}, {"example_inputs": IDS}, {"data": [IDS]}):
        result = tdecomp.decompose(Reads(), "svd", rank=ratio, **given, **QUIET)
        if given:
            assert "read outside its own forward" in result.report["tokens"].reason
            result.model(IDS)
        else:
            with pytest.raises(ValueError, match="leave that layer alone"):
                result.model(IDS)


def test_a_resized_table_is_that_of_the_chain():
    chain = decomposed(table(padding_idx=3))
    chain.weight.data = torch.cat([chain.weight.data, torch.ones(2, 5, dtype=torch.float64)])
    chain.num_embeddings = 32
    assert tuple(chain[0].weight.shape) == tuple(chain.weight.shape) == (32, 5)
    torch.testing.assert_close(chain(torch.tensor([31])), chain[1].weight.sum(1)[None])
