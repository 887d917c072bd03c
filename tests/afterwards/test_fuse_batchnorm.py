"""Batch norm folded into layers and chains, exactly, or left where that cannot be."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import tdecomp
from tdecomp import batchnorm_folds, fuse_batchnorm
from tests.unchanged import unchanged

QUIET = {"progress": False, "allow_expansion": True}
# A layer with 12 outputs, and an input of it.
LAYERS = {
    "linear": (lambda: nn.Linear(8, 12), (5, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, bias=False), (2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), (2, 8, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(8, 12, 3, stride=2), (2, 8, 5, 5, 5)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4, bias=False), (2, 8, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(12, 12, 3, groups=12), (2, 12, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose1d(8, 12, 3, stride=2), (2, 8, 9)),
    "transposed-2": (lambda: nn.ConvTranspose2d(8, 12, 3, groups=2), (2, 8, 6, 6)),
    "transposed-3": (lambda: nn.ConvTranspose3d(8, 12, 3, groups=2, bias=False), (2, 8, 4, 4, 4)),
}


def norm_for(x, channels=12, seed=3, **options):
    """A batch norm that has seen data and was trained, for inputs like x."""
    generator = torch.Generator().manual_seed(seed)
    norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[x.dim()]
    norm = norm(channels, **options)
    with torch.no_grad():
        norm.running_mean.normal_(generator=generator)
        norm.running_var.uniform_(0.1, 3, generator=generator)
        for parameter in norm.parameters():
            parameter.normal_(generator=generator)
    return norm


def conv(inputs=12, bias=True, kernel=3):
    return nn.Conv2d(inputs, 12, kernel, padding=kernel // 2, bias=bias)


X = torch.randn(2, 12, 6, 6, generator=torch.Generator().manual_seed(0))


def fold_of(model, name, x=None):
    return next(fold for fold in batchnorm_folds(model, x) if fold.norm == name)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_takes_its_batch_norm(kind, affine):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = nn.Sequential(make(), norm_for(x, affine=affine), nn.ReLU()).eval()
    layer, out = model[0], model(x)
    with unchanged(model):
        fused = fuse_batchnorm(model, x)
    assert type(fused[0]) is type(layer)
    assert type(fused[1]) is nn.Identity
    assert fused[0].bias.requires_grad
    torch.testing.assert_close(fused(x), out)
    if kind != "linear":
        torch.testing.assert_close(fuse_batchnorm(model)(x), out)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", ["lowrank", "spatial", "tucker2", "cp", "cp-separable", "svd"])
def test_the_last_stage_of_a_chain_takes_it(method, bias):
    torch.manual_seed(0)
    layer = conv(bias=bias, kernel=1 if method == "svd" else 3)
    model = nn.Sequential(layer, norm_for(X), nn.ReLU()).eval()
    rank = (4, 4) if method == "tucker2" else 4
    model = tdecomp.decompose(model, method, rank=rank, **QUIET).model
    first, stages = model[0][0].weight, len(model[0])
    fused = fuse_batchnorm(model)
    torch.testing.assert_close(fused(X), model(X))
    chain = fused[0]
    assert isinstance(chain, tdecomp.Chain)
    assert (len(chain), chain.method, chain.rank) == (stages, method, rank)
    assert torch.equal(chain[0].weight, first)
    assert chain[0].weight is not first
    assert chain.replaced.bias
    assert chain.bias.shape == (12,)
    assert model[0].replaced.bias == bias
    # It can go on to lower ranks and back to a layer.
    torch.testing.assert_close(tdecomp.recompose(fused)(X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_rounded_once(dtype):
    model = nn.Sequential(conv(), norm_for(X)).eval().to(dtype)
    exact = fuse_batchnorm(copy.deepcopy(model).double())
    fused = fuse_batchnorm(model)
    assert torch.equal(fused[0].weight, exact[0].weight.to(dtype))
    assert torch.equal(fused[0].bias, exact[0].bias.to(dtype))


def test_in_place_all_else_stays_the_same_object():
    model = nn.Sequential(conv(), norm_for(X), nn.Sequential(conv(bias=False), norm_for(X))).eval()
    model[0].weight.requires_grad_(False)
    out, inner = model(X), model[2]
    assert fuse_batchnorm(model, inplace=True) is model
    assert model[2] is inner
    assert not model[0].weight.requires_grad
    torch.testing.assert_close(model(X), out)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_channels_last_stay_last():
    model = nn.Sequential(conv(), norm_for(X)).eval().to(memory_format=torch.channels_last)
    weight = fuse_batchnorm(model)[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_nothing_to_fold():
    model = nn.Sequential(conv(), nn.ReLU()).eval()
    assert batchnorm_folds(model) == []
    assert fuse_batchnorm(model, inplace=True) is model
    assert torch.equal(fuse_batchnorm(model)(X), model(X))


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


def test_a_model_is_saved_before_it_is_fused(tmp_path):
    model = nn.Sequential(conv(bias=False), norm_for(X)).eval()
    result = tdecomp.decompose(model, "lowrank", rank=4, **QUIET)
    result.save(tmp_path / "small.safetensors")
    loaded = fuse_batchnorm(tdecomp.load(tmp_path / "small.safetensors", model))
    torch.testing.assert_close(loaded(X), result.model(X))
    fuse_batchnorm(result.model, inplace=True)
    with pytest.raises(
        ValueError, match=r"layer '0' stands for .*, as after fuse_batchnorm; a file"
    ):
        result.save(tmp_path / "fused.safetensors")


def test_train_mode_is_refused_in_words():
    model = nn.Sequential(conv(), norm_for(X))
    with pytest.raises(
        ValueError, match=r"the model is in train mode, .*; expected one in eval mode"
    ):
        fuse_batchnorm(model)
    with pytest.raises(TypeError, match=r"expected an nn.Module"):
        fuse_batchnorm("model")
    with pytest.raises(ValueError, match=r"the model rejected example_inputs \(float32 tensor"):
        fuse_batchnorm(model.eval(), X[:, :3])


def test_in_place_is_all_or_nothing(monkeypatch):
    model = nn.Sequential(conv(), norm_for(X), conv(), norm_for(X)).eval()
    monkeypatch.setattr(nn.Identity, "__init__", lambda *_: 1 / 0)
    with unchanged(model), pytest.raises(ZeroDivisionError):
        fuse_batchnorm(model, inplace=True)


def test_one_batch_norm_under_two_names():
    model = Net(lambda m, x: m.norm(m.conv(x)))
    model.second = model.norm
    fused = fuse_batchnorm(model)
    assert fused.norm is fused.second
    assert type(fused.norm) is nn.Identity


def test_a_batch_norm_without_values():
    model = nn.Sequential(conv(), norm_for(X).to("meta")).eval()
    assert fold_of(model, "1").reason == "on the meta device, without values"
