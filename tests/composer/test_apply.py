"""The walk over a model, the names, and the benchmark."""

import copy
import inspect

import pytest
import torch
from torch import nn

import tdecomp.composer
from benchmarks.composer_fit import compare, problem
from tdecomp.composer.apply import apply_factorization
from tdecomp.composer.core import LowRankSolution, factorize_conv2d, factorize_matrix
from tdecomp.composer.modules import FactorizedConv2d, FactorizedLinear, factorizing_could_speedup
from tests.unchanged import unchanged


def test_names_orders_and_defaults():
    assert set(tdecomp.composer.__all__) == {
        "FactorizedConv2d", "FactorizedLinear", "LowRankSolution", "apply_factorization",
        "factorize_conv2d", "factorize_matrix", "factorizing_could_speedup",
    }  # fmt: skip
    empty = LowRankSolution()
    assert (empty.Wa, empty.Wb, empty.bias, empty.rank, empty.nmse) == (None, None, None, -1, 0)
    signatures = {
        factorize_matrix: "X Y Wa Wb=None bias=None rank=0.25 n_iters=3",
        factorize_conv2d: "X Wa Wb=None rank=0.25 biasA=None biasB=None n_iters=3 conv2d_kwargs",
        FactorizedLinear: "in_features out_features bias=True latent_features=0.25 "
        "device=None dtype=None",
        FactorizedConv2d: "in_channels out_channels kernel_size latent_channels=0.25 conv2d_kwargs",
        FactorizedLinear.from_linear: "module module_ix=-1 latent_features=0.25 keep_weights=True",
        FactorizedConv2d.from_conv2d: "module module_ix=-1 latent_channels=0.25 keep_weights=True",
        FactorizedLinear.set_rank: "self input rank",
        factorizing_could_speedup: "module latent_size",
        apply_factorization: "model factorize_convs=True factorize_linears=True min_channels=512 "
        "latent_channels=0.25 min_features=512 latent_features=0.25 optimizers=None",
    }
    for function, expected in signatures.items():
        parameters = inspect.signature(function).parameters.values()
        got = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
        assert " ".join(got) == expected


# The model ----------------------------------------------------------------------------------------

SMALL = {"min_channels": 16, "min_features": 16}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32)
        self.fc = nn.Linear(32, 64)
        self.again = self.fc
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = self.depthwise(self.body(self.stem(x)).relu()).mean((2, 3))
        return self.head(self.again(x))


def test_wide_layers_are_replaced():
    model = Net()
    assert apply_factorization(model, **SMALL) is model
    kinds = {name: type(module) for name, module in model.named_children()}
    assert kinds["body"] is FactorizedConv2d
    assert model.fc is model.again
    assert isinstance(model.fc, FactorizedLinear)
    assert kinds["stem"] is kinds["depthwise"] is nn.Conv2d
    assert kinds["head"] is nn.Linear
    assert (model.body.latent_channels, model.fc.latent_features) == (4, 8)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert model.body.module0.weight.grad is not None


@pytest.mark.parametrize(
    "options, replaced",
    [
        ({}, set()),
        ({"min_channels": 16}, {"body"}),
        ({"min_channels": 17}, set()),
        ({"min_features": 32}, {"fc"}),
        ({"min_features": 33}, set()),
        ({**SMALL, "factorize_convs": False}, {"fc"}),
        ({**SMALL, "factorize_linears": False}, {"body"}),
        ({**SMALL, "latent_channels": 26, "latent_features": 21}, {"body", "fc"}),
        ({**SMALL, "latent_channels": 27, "latent_features": 22}, set()),
        ({"min_channels": 0, "min_features": 0}, {"stem", "body", "fc", "head"}),
    ],
)
def test_which_layers(options, replaced):
    model = apply_factorization(Net(), **options)
    kinds = (FactorizedConv2d, FactorizedLinear)
    assert {n for n, m in model.named_children() if isinstance(m, kinds)} == replaced


def test_a_replaced_model_approximates_the_old_one():
    model, x = Net(), torch.randn(4, 3, 8, 8)
    before = copy.deepcopy(model)
    apply_factorization(model, latent_channels=24, latent_features=20, **SMALL)
    with torch.no_grad():
        assert float((model(x) - before(x)).norm() / before(x).norm()) < 0.5


def test_a_second_time_changes_nothing():
    model = apply_factorization(Net(), min_channels=0, min_features=0)
    before = list(model.modules())
    apply_factorization(model, min_channels=0, min_features=0)
    assert list(map(id, model.modules())) == list(map(id, before))


def test_a_model_that_is_a_layer():
    layer = nn.Linear(32, 64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    new = apply_factorization(layer, min_features=16, optimizers=optimizer)
    assert isinstance(new, FactorizedLinear)
    assert optimizer.param_groups[0]["params"] == list(new.parameters())


def test_layers_that_others_read_stay():
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(32, 2),
            "encoder": nn.TransformerEncoderLayer(32, 2, 64),
            "mine": type("Mine", (nn.Linear,), {})(32, 32),
            "norm": nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)),
        }
    )
    before = list(model.modules())
    assert apply_factorization(model, **SMALL) is model
    assert list(model.modules()) == before
    bare = nn.Sequential(nn.ReLU())
    assert apply_factorization(bare) is bare


@pytest.mark.parametrize("several", [False, True])
def test_optimizers_follow(several):
    model = Net()
    half = [*model.body.parameters()], [*model.fc.parameters(), *model.head.parameters()]
    if several:
        optimizers = [torch.optim.SGD(half[0], lr=0.1, momentum=0.9), torch.optim.Adam(half[1])]
        listed = optimizers
    else:
        listed = [torch.optim.Adam([*half[0], *half[1]])]
        optimizers = listed[0]
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    for optimizer in listed:
        optimizer.step()
    apply_factorization(model, optimizers=optimizers, **SMALL)
    held = {id(p) for o in listed for g in o.param_groups for p in g["params"]}
    trained = [*model.body.parameters(), *model.fc.parameters(), *model.head.parameters()]
    assert held == {id(p) for p in trained}
    before = model.body.module0.weight.clone()
    for optimizer in listed:
        optimizer.zero_grad()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    for optimizer in listed:
        optimizer.step()
    assert not torch.equal(before, model.body.module0.weight)


def test_errors_leave_the_model_alone():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nn.init.constant_(model.fc.weight, torch.nan)
    with unchanged(model):
        with pytest.raises(ValueError, match=r"layer 'fc'.*NaN"):
            apply_factorization(model, optimizers=optimizer, **SMALL)
        for option in ("latent_channels", "latent_features"):
            with pytest.raises(ValueError, match=f"{option}: got -1"):
                apply_factorization(model, **{option: -1})
            with pytest.raises(TypeError, match=f"{option}: got None"):
                apply_factorization(model, **{option: None})
        with pytest.raises(TypeError, match=r"optimizers: expected .* got str"):
            apply_factorization(model, optimizers=["adam"])
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got int"):
        apply_factorization(3)


def test_a_forgotten_parameter_is_named():
    model = Net()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    with unchanged(model), pytest.raises(UserWarning, match=r"body\.bias, body\.weight, fc\.bias"):
        apply_factorization(model, optimizers=optimizer, **SMALL)


# The benchmark ------------------------------------------------------------------------------------


def test_the_baseline_is_no_better():
    fits = compare(*problem(16, 6, 8), rank=4, repeats=1)
    alternating, closed = fits["alternating"].nmse, fits["closed form"].nmse
    assert closed <= alternating + 1e-6
    assert alternating < closed + 0.1
