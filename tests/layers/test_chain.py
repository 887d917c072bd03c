"""A chain answers for the layer that it replaced."""

import copy
import pickle
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import tdecomp
from tests.unchanged import unchanged

QUIET = {"progress": False, "allow_expansion": True}
LAYERS = [
    nn.Linear(16, 12),
    nn.Conv1d(8, 12, 3, stride=2, padding=1, dilation=2, groups=2, bias=False),
    nn.Conv2d(8, 12, (3, 5), stride=(1, 2), padding="valid", padding_mode="zeros"),
    nn.Conv3d(4, 6, 3, padding=1, padding_mode="reflect"),
    nn.ConvTranspose2d(8, 12, 3, stride=2, padding=1, output_padding=1, groups=2),
]
NAMES = [
    "in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride",
    "padding", "dilation", "groups", "padding_mode", "output_padding", "transposed",
]  # fmt: skip


@contextmanager
def quiet():
    """Old torch functions warn that they are old."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def chain_for(layer, **options):
    method = "svd" if isinstance(layer, nn.Linear) else "lowrank"
    return tdecomp.decompose(nn.Sequential(layer), method, rank=2, **options, **QUIET).model[0]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_it_has_the_attributes_and_the_description_of_the_weight(layer):
    layer = copy.deepcopy(layer)
    layer.weight.requires_grad_(False)
    chain = chain_for(layer)
    for name in NAMES:
        assert getattr(chain, name, "none") == getattr(layer, name, "none"), name
    assert chain.weight.shape == layer.weight.shape
    assert chain.weight.dtype == layer.weight.dtype
    assert (chain.bias is None) == (layer.bias is None)
    assert chain.bias is None or chain.bias.shape == layer.bias.shape
    assert not chain.weight.requires_grad
    assert list(chain.state_dict()) == [n for n, _ in chain.named_parameters()]
    assert "weight" not in dict(chain.named_parameters())


def test_the_description_follows_the_weights(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16))
    result = tdecomp.decompose(model, "svd", rank=2, **QUIET)
    assert result.model[0].weight.requires_grad
    for twin in (copy.deepcopy(result.model), pickle.loads(pickle.dumps(result.model))):
        assert twin[0].weight.shape == (16, 16)
    half = copy.deepcopy(result.model).to(torch.bfloat16)
    assert half[0].weight.dtype == torch.bfloat16
    assigned = copy.deepcopy(result.model)
    assigned.load_state_dict(half.state_dict(), assign=True)
    assert assigned[0].weight.dtype == torch.bfloat16
    tdecomp.Decomposition(half, result.report, result.plan).save(tmp_path / "half")
    assert tdecomp.load(tmp_path / "half", model)[0].weight.dtype == torch.bfloat16


def test_initialisers_reach_the_stages_and_not_the_description():
    chain = chain_for(nn.Linear(16, 16))

    def initialise(module):
        if hasattr(module, "weight"):
            nn.init.constant_(module.weight, 0.5)

    chain.apply(initialise)
    assert all((p == 0.5).all() for n, p in chain.named_parameters() if "weight" in n)


@pytest.mark.parametrize(
    "use",
    [
        nn.functional.linear,
        lambda x, w: x @ w.T,
        lambda x, w: x @ w.detach().float().chunk(2)[0].T,
        lambda x, w: torch.addmm(x, x, w),
        lambda x, w: nn.functional.conv1d(x[..., None], w[..., None]),
        lambda x, w: nn.functional.linear(x, torch.cat([w, w])),
        lambda x, w: x @ nn.Linear(16, 16, device=w.device).weight.data.copy_(w),
    ],
)
def test_values_that_are_gone_are_refused(use):
    chain = chain_for(nn.Linear(16, 16))
    for twin in (chain, copy.deepcopy(chain), pickle.loads(pickle.dumps(chain)).half().float()):
        with pytest.raises(ValueError, match=r"layer's weight \(of shape \(\d+, \d+"):
            use(torch.ones(16, 16), twin.weight)


def test_pruning_and_weight_norm_are_refused():
    chain = chain_for(nn.Linear(16, 16))
    with unchanged(chain):
        with pytest.raises(ValueError, match="prune or reparametrize the layers in it"):
            prune.l1_unstructured(chain, "weight", 0.5)
        for norm in (nn.utils.weight_norm, nn.utils.spectral_norm):
            with quiet(), pytest.raises(ValueError, match="prune or reparametrize the layers"):
                norm(chain)
        with pytest.raises(ValueError, match="weight"):
            parametrizations.weight_norm(chain)
        values = {"weight": torch.ones(16, 16)}
        with pytest.raises(ValueError, match="a chain has no parameter 'weight'"):
            torch.func.functional_call(chain, values, torch.ones(3, 16))


@pytest.mark.parametrize("inplace", [True, False])
def test_results_are_ordinary_modules(inplace):
    torch.manual_seed(0)
    x = torch.ones(3, 16)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    model = tdecomp.decompose(model, "svd", rank=2, inplace=inplace, **QUIET).model
    ways = {
        "script": torch.jit.script,
        "trace": lambda m: torch.jit.trace(m, x),
        "fx": torch.fx.symbolic_trace,
        "export": lambda m: torch.export.export(m, (x,)).module(),
        "compile": lambda m: torch.compile(m, fullgraph=True, backend="eager"),
        "deepcopy": copy.deepcopy,
        "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    }
    with quiet():
        for way, make in ways.items():
            assert torch.equal(make(model)(x), model(x)), way
        small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert (small(x) - model(x)).norm() < 0.05 * model(x).norm()
    assert model.half()(x.half()).dtype == torch.half


class Branching(nn.Module):
    """Runs its first layer again for the gradients instead of keeping what it gave."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.second(checkpoint(self.first, x, use_reentrant=False))


def test_gradient_checkpoints_work():
    x = torch.randn(3, 16)
    model = tdecomp.decompose(Branching(), "svd", rank=2, example_inputs=x, **QUIET).model
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


class Reader(nn.Module):
    """Its forward reads what layers are like, as Whisper, T5 and CLIP do."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv1d(16, 32, 3, stride=2), nn.Linear(64, 64)
        self.out = nn.Linear(64, 8)

    def forward(self, x):
        n = (x.shape[-1] - 3) // self.conv.stride[0] + 1
        x = self.fc(self.conv(x)[..., :n].reshape(-1, self.fc.in_features))
        if x.dtype != self.out.weight.dtype or self.out.weight.shape[1] != x.shape[1]:
            raise ValueError("no")
        return self.out(x.to(self.out.weight.dtype))


@pytest.mark.skipif(
    torch.__version__.startswith("2.4."), reason="its compiler cannot follow `weight.dtype`"
)
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("inputs", [True, False])
def test_models_that_read_what_layers_are_like_go_on(inplace, inputs):
    model, x = Reader().eval(), torch.randn(2, 16, 33)
    example = {"example_inputs": x} if inputs else {}
    result = tdecomp.decompose(
        model, ["svd", "lowrank"], rank=0.25, inplace=inplace, **example, **QUIET
    )
    assert all(row.method is not None for row in result.report)
    assert result.model(x).shape == (16, 8)
    compiled = torch.compile(result.model, fullgraph=True, backend="eager")
    exported = torch.export.export(result.model, (x,)).module()
    with quiet():  # of what it compares, which is the same in every call
        traced = torch.jit.trace(result.model, x)
    for way in (compiled, exported, traced):
        assert torch.equal(way(x), result.model(x))


def test_a_chain_that_version_0_2_pickled():
    chain = tdecomp.decompose(nn.Linear(8, 8), "svd", rank=2, progress=False).model
    now, then = b"tdecomp.layers.chain\nDescribed\n", b"tdecomp.layers.chain\n_Described\n"
    data = pickle.dumps(chain, protocol=0)
    assert now in data
    back = pickle.loads(data.replace(now, then))
    assert tuple(back.weight.shape) == (8, 8)
