"""From a decomposed model on to lower ranks."""

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp import reduce_ranks
from tdecomp.decomposers.registry import get_decomposer
from tests.unchanged import unchanged


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(6, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(12 * 36, 10),
    ).eval()


X = torch.randn(16, 6, 6, 6, generator=torch.Generator().manual_seed(1))
METHODS = (["lowrank", "svd"], ["tucker2", "svd"], ["cp", "svd"], ["cp-separable"], ["spatial"])


def decomposed(methods=("lowrank", "svd"), rank=0.75, **options):
    return tdecomp.decompose(
        model(),
        list(methods),
        rank=rank,
        example_inputs=X[:1],
        allow_expansion=True,
        progress=False,
        **options,
    )


@pytest.mark.parametrize("methods", METHODS, ids=lambda m: m[0])
@pytest.mark.parametrize("data", [None, [X]], ids=["weights", "data"])
def test_every_method_goes_on_to_lower_ranks(methods, data):
    first = decomposed(methods)
    with unchanged(first.model):
        second = reduce_ranks(first, rank=0.5, data=data, progress=False)
    for row in second.plan:
        if row.method is None:
            continue
        chain = second.model.get_submodule(row.name)
        assert chain.rank == row.rank
        assert chain.rank != first.plan[row.name].rank
        assert [tuple(p.weight.shape) for p in chain] == [
            s.weight_shape for s in get_decomposer(row.method).stages(row.layer, row.rank)
        ]
        assert 0 <= second.report[row.name].weight_error < 1
        assert (second.report[row.name].output_error is None) == (data is None)
    assert second.model(X).shape == (16, 10)
    assert second.report.after.macs < first.report.after.macs


def test_closed_form_methods_give_what_the_original_at_that_rank_would_have():
    straight = decomposed(rank={"0": 3, "4": 2})
    stepwise = reduce_ranks(
        decomposed(rank={"0": 9, "4": 6}), rank={"0": 3, "4": 2}, progress=False
    )
    with torch.no_grad():
        assert torch.allclose(stepwise.model(X), straight.model(X), atol=1e-5)


def test_trained_weights_go_on():
    first = decomposed()
    with torch.no_grad():
        for p in first.model.parameters():
            p.mul_(1.1)
    same = reduce_ranks(first, rank={"0": first.plan["0"].rank}, progress=False)
    with torch.no_grad():
        assert torch.equal(same.model(X), first.model(X))
    lower = reduce_ranks(first, rank={"0": first.plan["0"].rank - 1}, progress=False)
    with torch.no_grad():
        lost = (lower.model(X) - first.model(X)).norm() / first.model(X).norm()
    assert 0 < lost < 0.3


def test_in_place_with_an_optimizer_that_follows():
    first = decomposed()
    optimizer = torch.optim.Adam(
        [
            {"params": [p for p in first.model.parameters() if p.dim() > 1], "lr": 0.1},
            {"params": [p for p in first.model.parameters() if p.dim() == 1], "lr": 0.2},
        ]
    )
    first.model(X).square().sum().backward()
    optimizer.step()
    second = reduce_ranks(first, rank=0.5, inplace=True, optimizers=optimizer, progress=False)
    assert second.model is first.model
    weights, biases = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert weights == {id(p) for p in second.model.parameters() if p.dim() > 1}
    assert biases == {id(p) for p in second.model.parameters() if p.dim() == 1}
    optimizer.zero_grad()
    second.model(X).square().sum().backward()
    optimizer.step()


def test_names_in_an_optimizer_follow():
    first = decomposed()
    optimizer = torch.optim.SGD(list(first.model.named_parameters()), lr=0.1)
    second = reduce_ranks(first, rank=0.5, inplace=True, optimizers=optimizer, progress=False)
    (group,) = optimizer.param_groups
    assert dict(zip(group["param_names"], map(id, group["params"]), strict=True)) == {
        name: id(p) for name, p in second.model.named_parameters()
    }


def test_a_budget_of_the_model_as_it_is_now():
    first = decomposed(["lowrank", "svd"], rank=0.9)
    second = reduce_ranks(first, rank=tdecomp.Budget(macs=0.6), data=[X], progress=False)
    assert second.report.after.macs <= 0.6 * first.report.after.macs


def test_its_plan_makes_an_empty_model_that_takes_the_weights(tmp_path):
    second = reduce_ranks(decomposed(), rank=0.5, progress=False)
    second.save(tmp_path / "small.safetensors")
    loaded = tdecomp.load(tmp_path / "small.safetensors", model())
    with torch.no_grad():
        assert torch.equal(loaded.eval()(X), second.model(X))


def test_a_rank_above_the_current_one():
    with pytest.raises(ValueError, match=r"layer '0': rank 11 is above its current one, 9"):
        reduce_ranks(decomposed(rank=9), rank={"0": 11}, progress=False)
    with pytest.raises(ValueError, match="above its current one"):
        reduce_ranks(decomposed(rank=4), rank=6, progress=False)


def test_a_model_without_its_chains():
    first = decomposed()
    first.model[0] = nn.Conv2d(6, 12, 3)
    with pytest.raises(ValueError, match="has no chains where the plan has them"):
        reduce_ranks(first, rank=2, progress=False)


def test_moments_of_the_original_are_refused():
    moments = tdecomp.calibrate(model(), [X], progress=False)
    with pytest.raises(ValueError, match="expected batches"):
        reduce_ranks(decomposed(), rank=2, data=moments, progress=False)


def test_a_model_that_was_fused_no_longer_follows_the_plan():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)).eval()
    result = tdecomp.decompose(model, "svd", rank=4, progress=False)
    tdecomp.fuse_batchnorm(result.model, inplace=True)
    with unchanged(result.model), pytest.raises(ValueError, match="layer '0' stands for Conv2d"):
        reduce_ranks(result, rank=2, progress=False)
