"""Tensor trains in whole models: planned, saved, refitted, reduced, timed, and in a budget."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.decomposers.tt import TT
from tdecomp.layers.geometry import Call
from tdecomp.layers.spec import LayerSpec
from tdecomp.layers.tensor_train import TTLinear
from tests.decomposers.oracle import distance

QUIET = {"progress": False}


def model(seed=0, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = (nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 32, bias=False))
        return nn.Sequential(*layers).to(dtype).eval()


def drawn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sum_of_kronecker(shapes, terms, seed=0):
    """A weight (out, in) with noise of a hundredth of its size."""
    (o1, o2), (i1, i2) = shapes
    left, right = drawn(terms, o1, i1, seed=seed), drawn(terms, o2, i2, seed=seed + 1)
    weight = sum(torch.kron(a, b) for a, b in zip(left, right, strict=True))
    weight = weight / weight.norm() * math.sqrt(o1 * o2)
    return weight + 0.01 * drawn(*weight.shape, seed=seed + 2) * weight.std()


def kronecker_model(features=256):
    """Three layers; the first one is nearly a sum of three Kronecker products."""
    net = nn.Sequential(
        *[layer for _ in range(3) for layer in (nn.Linear(features, features), nn.ReLU())]
    )
    shapes = TT().shapes(LayerSpec(features, features))
    with torch.no_grad():
        for seed, at in enumerate((2, 4)):
            # Of low rank, as trained layers nearly are.
            low = drawn(features, 40, seed=seed) @ drawn(40, features, seed=seed + 5)
            net[at].weight.copy_(low / 40 / features**0.5)
        net[0].weight.copy_(sum_of_kronecker(shapes, 3))
    return net


@pytest.mark.parametrize("method", [TT(), TT(cores=3)], ids=repr)
def test_at_full_rank_a_model_is_the_original_forward_and_backward(method):
    original, x = model(dtype=torch.float64), drawn(5, 3, 64).double()
    full = tdecomp.Ratio(1.0, of="rank")
    result = tdecomp.decompose(original, method, rank=full, allow_expansion=True, **QUIET)
    assert [type(result.model[i][0]) for i in (0, 2)] == [TTLinear] * 2
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [net(value) for net, value in zip((original, result.model), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0])
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    assert all(p.grad is not None for p in result.model.parameters())


@pytest.mark.parametrize(
    "method", [TT(), TT(in_shape=(4, 16), cores=2), TT(cores=3), TT((4, 4, 4), None, 3)], ids=repr
)
def test_saved_loaded_copied_and_planned_with_its_options(method, tmp_path):
    x = drawn(5, 64)
    result = tdecomp.decompose(model(), method, rank=2, include="0", **QUIET)
    assert result.model[0].decomposer == method
    result.save(tmp_path / "small.safetensors")
    loaded = tdecomp.load(tmp_path / "small.safetensors", model(seed=1))
    loaded[2].load_state_dict(model()[2].state_dict())
    expected = result.model(x)
    for net in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(net(x), expected)
        assert net[0].decomposer == method
    plan = tdecomp.Plan.from_json(result.plan.to_json())
    assert plan.decomposers["tt"] == method
    assert torch.equal(tdecomp.apply(model(), plan, **QUIET).model(x), expected)


def test_an_int_caps_every_inner_rank_and_a_tuple_gives_them_all():
    layer, method = nn.Linear(64, 64), TT(cores=3)
    assert method.max_rank(LayerSpec(64, 64)) == (16, 16)
    small = nn.Linear(8, 48)
    assert method.max_rank(LayerSpec.of(small)) == (8, 6)

    def rank(given, of=layer):
        return tdecomp.plan(of, method, rank=given, allow_expansion=True, **QUIET)[""].rank

    assert rank(5) == (5, 5)
    assert rank((3, 7)) == (3, 7)
    assert rank(7, small) == (7, 6)
    assert tdecomp.plan(small, method, rank=1, **QUIET).edit("", rank=8)[""].rank == (8, 6)
    with pytest.raises(ValueError, match=r"rank 9 is above .* at most '' \(tt\): \(8, 6\)"):
        rank(9, small)
    with pytest.raises(ValueError, match="tt takes 2 ranks"):
        rank((1, 2, 3))
    with pytest.raises(ValueError, match="tt takes one rank"):
        tdecomp.plan(layer, TT(), rank=(2, 2), **QUIET)


@pytest.mark.parametrize("cores", [2, 3])
def test_selectors_read_the_unfoldings(cores):
    layer, method = nn.Linear(64, 64), TT(cores=cores)
    (stage,) = method.stages(LayerSpec(64, 64), 3 if cores == 2 else (2, 3))
    planted = [drawn(*core.shape, seed=k) for k, core in enumerate(stage.build().cores)]
    with torch.no_grad():
        layer.weight.copy_(method.factors_of((tuple(planted),)).to_kernel())
        layer.weight += 1e-3 * drawn(64, 64) * layer.weight.std()
    expected = 3 if cores == 2 else (2, 3)
    for selector in ("vbmf", tdecomp.Energy(0.9999)):
        assert tdecomp.plan(layer, method, rank=selector, **QUIET)[""].rank == expected


@pytest.mark.parametrize("data", [False, True])
def test_the_report_has_costs_and_errors(data):
    original, x = model(), drawn(300, 3, 64)
    given = {"data": [x]} if data else {}
    result = tdecomp.decompose(original, "tt", rank=2, example_inputs=x[:5], **given, **QUIET)
    for row in result.report:
        chain, spec = result.model.get_submodule(row.name), row.layer
        assert row.params_after == sum(p.numel() for p in chain.parameters())
        assert row.macs_after == TT().stages(spec, 2)[0].macs(Call(15)) < row.macs_before
        kernel = chain(torch.eye(spec.in_channels)) - chain(torch.zeros(spec.in_channels))
        weight = original.get_submodule(row.name).weight
        assert row.weight_error == pytest.approx(distance(kernel.T, weight), rel=1e-3)
        assert (row.output_error is not None) is data
    if not data:  # the error that the plan expects is exact
        plan = tdecomp.plan(original, "tt", rank=2, **QUIET)
        for row in plan:
            assert row.expected_error == pytest.approx(
                result.report[row.name].weight_error, rel=1e-4
            )


@pytest.mark.parametrize("gradients", [False, True])
def test_refit_gains(gradients):
    original, x = model(), drawn(2000, 64) @ drawn(64, 64, seed=2)
    result = tdecomp.decompose(original, "tt", rank=4, **QUIET)
    options = {"gradients": gradients, "augment": None, **QUIET}
    recovery = tdecomp.refit(result.model, original, [x], **options)
    assert set(recovery.layers) == {"0", "2"}
    assert recovery.error_after < 0.9 * recovery.error_before
    assert all(after < before for before, after in recovery.layers.values())


def test_reconstruct_gains():
    original, x = model(), drawn(1000, 64) @ drawn(64, 64, seed=2)
    result = tdecomp.decompose(original, "tt", rank=4, **QUIET)
    recovery = tdecomp.reconstruct(result.model, original, [x], augment=None, seed=0, **QUIET)
    assert recovery.error_after < 0.9 * recovery.error_before


def test_ranks_are_reduced():
    original = model()
    result = tdecomp.decompose(original, "tt", rank=8, allow_expansion=True, **QUIET)
    smaller = tdecomp.reduce_ranks(result, rank=3, **QUIET)
    at_once = tdecomp.decompose(original, "tt", rank=3, **QUIET)
    assert [row.rank for row in smaller.plan] == [3, 3]
    for at in (0, 2):  # Eckart and Young: the cut of a cut is the cut
        kernels = [r.model[at](torch.eye(r.model[at].in_features)) for r in (smaller, at_once)]
        assert distance(*kernels) < 1e-4


def test_it_is_timed():
    original, x = model(), drawn(5, 64)
    times = tdecomp.profile(original, x, ["tt", "svd"], effort="quick", **QUIET)
    plan = tdecomp.plan(
        original, "tt", rank=1, example_inputs=x, profile=times, only_if_faster=True, **QUIET
    )
    assert all(row.latency_before is not None for row in plan)


def test_layers_of_zeros_can_learn_and_inputs_that_never_vary_do_no_harm():
    layer, x = nn.Linear(16, 16), drawn(50, 16)
    for given in (x, torch.ones(50, 16), torch.zeros(50, 16), x[:1]):
        result = tdecomp.decompose(nn.Sequential(layer), "tt", rank=2, data=[given], **QUIET)
        assert (result.model(given) - layer(given)).abs().max() < 1e-3 + layer(given).abs().max()
    nn.init.zeros_(layer.weight)
    chain = tdecomp.decompose(nn.Sequential(layer), "tt", rank=2, **QUIET).model
    assert torch.equal(chain(x), layer(x))
    optimizer = torch.optim.SGD(chain.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (chain(x) - 1).square().mean().backward()
        optimizer.step()
    assert all(p.any() and p.grad.any() for p in chain.parameters())


def test_its_parts_are_left_alone_by_a_second_decomposition():
    first = tdecomp.decompose(model(), "tt", rank=2, include="0", **QUIET)
    second = tdecomp.decompose(first.model, "svd", rank=2, **QUIET)
    before = "part of a chain that 'tt' made before"
    found = {row.name: row.method or row.reason for row in second.report}
    assert found == {"0.0.cores.0": before, "0.0.cores.1": before, "2": "svd"}


def test_conv1d_of_transformers():
    from benchmarks.support.torchvision_import import import_torchvision

    import_torchvision()
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer = pytorch_utils.Conv1D(48, 64)
    x = drawn(2, 7, 64)
    result = tdecomp.decompose(
        nn.Sequential(layer),
        "tt",
        rank=tdecomp.Ratio(1.0, of="rank"),
        allow_expansion=True,
        **QUIET,
    )
    assert distance(result.model(x), layer(x)) < 1e-5
    assert result.model[0].nf == 48


# -- in a budget -----------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("unit", ["macs", "params"])
def test_auto_takes_it_where_a_weight_is_a_sum_of_kronecker_products(data, unit):
    net, x = kronecker_model(), drawn(2000, 256)
    options = {"example_inputs": x[:4], **({"data": [x]} if data else {}), **QUIET}
    plan = tdecomp.plan(net, "auto", rank=tdecomp.Budget(**{unit: 0.4}), **options)
    assert {row.name: row.method for row in plan} == {"0": "tt", "2": "svd", "4": "svd"}
    assert plan["0"].rank >= 3
    assert plan["0"].macs_after < plan["0"].macs_before
    result = tdecomp.apply(net, plan, **({"data": [x]} if data else {}), **QUIET)
    assert result.report["0"].weight_error < 0.02


def test_auto_never_takes_it_where_it_would_do_more_work_per_input():
    """By its parameters alone a train of a high rank seems to be cheap."""
    net = kronecker_model()
    for share in (0.1, 0.2, 0.5):
        plan = tdecomp.plan(net, "auto", rank=tdecomp.Budget(params=share), **QUIET)
        assert plan["0"].method == "tt"
        for row in plan:
            if row.method == "tt":
                (stage,) = TT().stages(row.layer, row.rank)
                assert stage.macs(Call(1)) < row.layer.macs(Call(1))


def test_it_is_no_part_of_dense():
    plan = tdecomp.plan(kronecker_model(), "dense", rank=tdecomp.Budget(params=0.5), **QUIET)
    assert "tt" not in {row.method for row in plan}


@pytest.mark.parametrize("named", [False, True])
def test_an_optimizer_goes_on_with_the_cores(named):
    mine = model().train()
    parameters = mine.named_parameters() if named else mine.parameters()
    optimizer = torch.optim.SGD(list(parameters), lr=0.1)
    place = {"inplace": True, "optimizers": optimizer, **QUIET}
    first = tdecomp.decompose(mine, "tt", rank=6, **place)
    for _ in range(2):
        (group,) = optimizer.param_groups
        assert {*map(id, group["params"])} == {*map(id, mine.parameters())}
        if named:
            assert {*group["param_names"]} == {name for name, _ in mine.named_parameters()}
        before = [core.detach().clone() for core in mine[0][0].cores]
        mine(drawn(4, 64)).square().sum().backward()
        optimizer.step()
        assert not any(map(torch.equal, before, mine[0][0].cores))
        tdecomp.reduce_ranks(first, rank=2, **place)
