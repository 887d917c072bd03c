"""Which batch norms are the only readers of a layer, and why others stay."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import tdecomp
from tdecomp import fuse_batchnorm
from tests.afterwards.norms import X, conv, fold_of, norm_for

QUIET = {"progress": False, "allow_expansion": True}


class Net(nn.Module):
    """A layer and a batch norm, and a forward of one's own."""

    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.other = conv(), conv()
        self.norm, self.second = norm_for(X), norm_for(X, seed=4)
        self.own = forward
        self.eval()

    def forward(self, x):
        return self.own(self, x)


RIGHT = {
    "a layer that runs twice": lambda m, x: m.norm(m.conv(m.norm(m.conv(x)))),
    "its shape is read": lambda m, x: m.norm(y := m.conv(x)).reshape(y.shape[0], y.size(1), -1),
    "a residual": lambda m, x: m.norm(m.conv(x)) + x,
    "in place afterwards": lambda m, x: m.norm(m.conv(x)).relu_(),
}
ELSEWHERE = "the output of 'conv' is read elsewhere, too"
LEFT = {
    "a residual of its output": (lambda m, x: m.norm(y := m.conv(x)) + y, ELSEWHERE),
    "it is returned, too": (lambda m, x: (m.norm(y := m.conv(x)), y), ELSEWHERE),
    "two norms": (lambda m, x: m.norm(y := m.conv(x)) + m.second(y), f"{ELSEWHERE}: by 'second'"),
    "a function between": (
        lambda m, x: m.norm(m.conv(x).relu()),
        "its input is not the output of a layer",
    ),
    "another layer's, too": (
        lambda m, x: m.norm(m.conv(x)) + m.norm(m.other(x)),
        "it is called with the outputs of several: 'conv', 'other'",
    ),
    "another tensor, too": (
        lambda m, x: m.norm(m.conv(m.norm(x))),
        "it is called with the outputs of several: 'conv', another tensor",
    ),
    "read in one of its calls": (
        lambda m, x: m.norm(m.conv(x)) + m.conv(x + 1).sum(),
        ELSEWHERE,
    ),
    "its weight is read": (
        lambda m, x: m.norm(m.conv(x)) + m.conv.weight.sum(),
        "'conv': its weight is read outside its own forward",
    ),
    "the norm's weight is read": (
        lambda m, x: m.norm(m.conv(x)) + m.norm.weight.sum(),
        "its weight is read outside its own forward",
    ),
    "never called": (lambda m, x: m.conv(x), "no call reaches it"),
    "changed in place": (lambda m, x: m.norm(m.conv(x).relu_()), None),
}


@pytest.mark.parametrize("given", [None, X], ids=["graph", "pass"])
@pytest.mark.parametrize("case", RIGHT)
def test_uses_that_are_followed(case, given):
    model = Net(RIGHT[case])
    fused = fuse_batchnorm(model, given)
    assert type(fused.norm) is nn.Identity
    torch.testing.assert_close(fused(X), model(X))


@pytest.mark.parametrize("given", [None, X], ids=["graph", "pass"])
@pytest.mark.parametrize("case", LEFT)
def test_uses_that_leave_it_alone(case, given):
    forward, reason = LEFT[case]
    model = Net(forward)
    fold = fold_of(model, "norm", given)
    assert fold.reason is not None
    assert reason in (None, fold.reason)
    fused = fuse_batchnorm(model, given)
    assert type(fused.norm) is nn.BatchNorm2d
    torch.testing.assert_close(fused(X), model(X))


def hooked(part):
    part.register_forward_hook(lambda *_: None)


def untracked(model):
    model[1] = nn.BatchNorm2d(12, track_running_stats=False).eval()


def narrow(model):
    model[0] = nn.Sequential(nn.Conv2d(12, 24, 1), nn.PixelShuffle(2))
    model[1].eval()


def tied(model):
    model[2].weight = model[0].weight


class Act(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def with_activation(model):
    model[1] = Act(12).eval()


ODD = {
    "train mode": (lambda m: m[1].train(), "in train mode"),
    "no statistics": (untracked, "it has no running statistics: it takes those of each batch"),
    "hooked norm": (lambda m: hooked(m[1]), "it has hooks of its own, which would be lost"),
    "hooked layer": (
        lambda m: hooked(m[0]),
        "the layer before it cannot be replaced: it has hooks",
    ),
    "overridden": (with_activation, "Act overrides forward"),
    "tied": (tied, "the layer before it cannot be replaced: its weight is tied: '0', '2' share it"),
    "parametrized": (
        lambda m: parametrizations.weight_norm(m[0]),
        "the layer before it cannot be replaced: parametrized",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_layers_and_norms_that_stay(case):
    change, reason = ODD[case]
    torch.manual_seed(0)
    model = nn.Sequential(conv(), norm_for(X), conv()).eval()
    change(model)
    fold = fold_of(model, "1", X)
    assert fold.reason.startswith(reason)
    fused = fuse_batchnorm(model, X)
    assert type(fused[1]) is type(model[1])
    torch.testing.assert_close(fused.eval()(X), model.eval()(X))


def test_a_linear_layer_needs_inputs_that_show_its_dimensions():
    torch.manual_seed(0)
    x = torch.randn(5, 12)
    model = nn.Sequential(nn.Linear(12, 12), norm_for(x)).eval()
    assert "example_inputs show" in fold_of(model, "1").reason
    assert fold_of(model, "1", x).reason is None
    # The channels of this batch norm are the second dimension, which are no features.
    words = torch.randn(2, 12, 12)
    assert "its channels are not those of '0'" in fold_of(model, "1", words).reason


def test_a_chain_with_a_module_of_its_own_and_one_with_hooks():
    model = nn.Sequential(conv(), norm_for(X)).eval()
    model = tdecomp.decompose(model, "lowrank", rank=4, **QUIET).model
    handle = model[0].register_forward_hook(lambda *_: None)
    assert "the chain before it has hooks" in fold_of(model, "1").reason
    handle.remove()
    assert fold_of(model, "1").reason is None
    model[0][1] = nn.Sequential(model[0][1])
    assert fold_of(model, "1").reason == (
        "the chain before it ends in a module of its own (Sequential)"
    )


class Branches(nn.Module):
    """What is done depends on the values of the inputs."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(), norm_for(X)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) if y.mean() > -1e9 else y


def test_a_model_that_cannot_be_traced_needs_example_inputs():
    model = Branches().eval()
    with pytest.raises(
        ValueError, match=r"torch.fx cannot trace the model .*expected example_inputs"
    ):
        fuse_batchnorm(model)
    # One call that reads the output is enough to leave it.
    assert fold_of(model, "norm", X).reason == "the output of 'conv' is read elsewhere, too"


class Optional(nn.Module):
    """Its output is read elsewhere only when an optional argument is left out."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(), norm_for(X)

    def forward(self, x, residual=None):
        y = self.conv(x)
        return self.norm(y) + (y if residual is None else residual)


def test_branches_on_optional_arguments_count_both():
    assert fold_of(Optional().eval(), "norm").reason == ELSEWHERE


def test_one_batch_norm_under_two_names():
    model = Net(lambda m, x: m.norm(m.conv(x)))
    model.second = model.norm
    fused = fuse_batchnorm(model)
    assert fused.norm is fused.second
    assert type(fused.norm) is nn.Identity


def test_a_batch_norm_without_values():
    model = nn.Sequential(conv(), norm_for(X).to("meta")).eval()
    assert fold_of(model, "1").reason == "on the meta device, without values"


def test_a_table_has_no_bias_to_fold_into():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 12), norm_for(torch.randn(2, 12))).eval()
    ids = torch.arange(5)
    small = tdecomp.decompose(model, "svd", rank=3, **QUIET).model
    for each in (model, small):
        fold = fold_of(each, "1", ids)
        assert fold.reason == "Embedding has no bias"
        torch.testing.assert_close(fuse_batchnorm(each, ids)(ids), each(ids))
