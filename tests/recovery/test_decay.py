import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.decomposers.registry import get_decomposer

QUIET = {"progress": False}
CONVOLUTIONS = [
    nn.Conv2d(8, 12, 3, padding=1),
    nn.Conv2d(8, 12, (3, 5), groups=2),
    nn.ConvTranspose2d(8, 6, 3),
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def layer_with_values(layer, dtype=torch.float64):
    twin = copy.deepcopy(layer).to(dtype)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator()) / 4)
    return twin


def chain_of(layer, method, rank=3):
    rank = (3, 2) if method == "tucker2" else rank
    return tdecomp.decompose(layer, method, rank=rank, allow_expansion=True, **QUIET).model


def gradients_of(value, chain):
    return torch.autograd.grad(value, [part.weight for part in chain])


def product(chain):
    """The weight that a chain stands for."""
    spec = chain.replaced
    assert spec is not None
    return chain.decomposer.factors_in(chain).to_kernel()


TAKEN = [
    pytest.param(name, layer, id=f"{name}-{type(layer).__name__}-{number}")
    for name in ("svd", "lowrank", "spatial", "tucker2", "cp", "cp-separable")
    for number, layer in enumerate([nn.Linear(10, 8), *CONVOLUTIONS])
    if get_decomposer(name).refusal(tdecomp.LayerSpec.of(layer)) is None
]


@pytest.mark.parametrize("method, layer", TAKEN)
def test_is_half_the_squared_norm_of_the_product_and_so_are_its_gradients(method, layer):
    chain = chain_of(layer_with_values(layer), method)
    found = tdecomp.factor_decay(chain, 0.02)
    assert found.item() == pytest.approx(0.01 * product(chain).square().sum().item(), rel=1e-9)
    gradients = gradients_of(found, chain)
    # Directions at random: the slope along each is the difference quotient's.
    for part, gradient in zip(chain, gradients, strict=True):
        step = torch.randn(part.weight.shape, generator=generator(1)).double() * 1e-5
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                part.weight.add_(sign * step)
                values.append(0.01 * product(chain).square().sum().item())
                part.weight.sub_(sign * step)
        slope = (values[0] - values[1]) / 2
        assert (gradient * step).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-13)


def test_decay_alone_shrinks_the_product_as_decay_of_the_weight_does():
    """Along the flow of full-rank factors the product's norm falls; ranks fall no faster."""
    layer = layer_with_values(nn.Linear(12, 12), torch.float32)
    chain = chain_of(layer, "svd", 12)
    before = torch.linalg.svdvals(product(chain))
    optimizer = torch.optim.SGD(chain.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        tdecomp.factor_decay(chain, 0.1).backward()
        optimizer.step()
    shrunk = torch.linalg.svdvals(product(chain)) / before
    assert (shrunk < 1).all()
    # Each singular value σ decays at the rate σ: the largest by the larger share.
    assert shrunk[0] < shrunk[-1]


def test_sums_over_the_chains_of_a_model_each_once():
    torch.manual_seed(0)
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(16, 16), nn.LayerNorm(16))
    small = tdecomp.decompose(model, "svd", rank={"0": 3, "3": 4}, **QUIET).model
    alone = [tdecomp.factor_decay(small[i], 0.1).item() for i in (0, 3)]
    assert tdecomp.factor_decay(small, 0.1).item() == pytest.approx(sum(alone), rel=1e-6)
    compiled_or_wrapped = nn.Sequential(small)
    assert tdecomp.factor_decay(compiled_or_wrapped, 0.1).item() == pytest.approx(sum(alone))


def test_a_chain_in_a_chain_counts_as_the_whole_product():
    layer = layer_with_values(nn.Conv2d(8, 12, 3))
    chain = chain_of(layer, "lowrank", 6)
    inner = chain_of(chain[0], "cp", 8)
    whole = torch.einsum("or,rikl->oikl", chain[1].weight.flatten(1), product(inner))
    chain[0] = inner
    found = tdecomp.factor_decay(chain, 2.0)
    assert found.item() == pytest.approx(whole.square().sum().item(), rel=1e-9)
    found.backward()
    assert all(p.grad is not None and p.grad.any() for p in chain.parameters() if p.dim() > 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    layer = layer_with_values(nn.Linear(64, 64), torch.float32)
    chain = chain_of(layer, "svd", 16)
    wanted = tdecomp.factor_decay(chain, 1.0).item()
    with torch.autocast("cpu", dtype=dtype):
        assert tdecomp.factor_decay(chain, 1.0).item() == pytest.approx(wanted, rel=1e-6)
    half = copy.deepcopy(chain).to(dtype)
    found = tdecomp.factor_decay(half, 1.0)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(wanted, rel=2e-2)
    found.backward()
    assert half[0].weight.grad.dtype == dtype


class Doubled(nn.Linear):
    """A module that is no stock layer."""

    def forward(self, x):
        return 2 * super().forward(x)


@dataclass(frozen=True)
class OwnStage:
    """A stage with a module of its own, as a method outside of the package may have."""

    spec: tdecomp.LayerSpec

    def __getattr__(self, name):
        return getattr(self.spec, name)

    def build(self, device=None, dtype=None):
        into, out, bias = self.spec.in_channels, self.spec.out_channels, self.spec.bias
        return Doubled(into, out, bias=bias, device=device, dtype=dtype)

    def put(self, module, values):
        with torch.no_grad():
            module.weight.copy_(values / 2)

    def read(self, module):
        return module.weight.detach().double() * 2


@dataclass(frozen=True)
class OwnModule(tdecomp.SVD):
    name = "own-module"

    def stages(self, spec, rank):
        first, second = super().stages(spec, rank)
        return OwnStage(first), second


@dataclass(frozen=True)
class Untold(tdecomp.LowRank):
    name = "untold"

    def factors_of(self, stage_weights):
        del stage_weights


def test_modules_of_a_methods_own_are_read_by_what_they_do():
    layer = layer_with_values(nn.Linear(10, 8))
    chain, plain = chain_of(layer, OwnModule()), chain_of(layer, "svd")
    found = tdecomp.factor_decay(chain, 1.0)
    assert found.item() == pytest.approx(tdecomp.factor_decay(plain, 1.0).item(), rel=1e-9)
    found.backward()
    assert chain[0].weight.grad.any()


def test_what_cannot_be_decayed_is_refused_in_words():
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="factor_decay: the model has no chains; expected what"):
        tdecomp.factor_decay(model, 1e-4)
    with pytest.raises(TypeError, match="factor_decay: expected a model, got float"):
        tdecomp.factor_decay(1e-4, model)
    small = nn.Sequential(chain_of(layer_with_values(nn.Conv2d(8, 8, 3)), Untold()))
    for wrong in (-1.0, float("nan"), True, "1e-4"):
        with pytest.raises(ValueError, match="expected weight_decay to be a number of 0 or more"):
            tdecomp.factor_decay(small, wrong)
    with pytest.raises(ValueError, match=r"layer '0' \(Conv2d.*untold cannot tell the factors"):
        tdecomp.factor_decay(small, 1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantized tensor:UserWarning")
@pytest.mark.parametrize("method", ["svd", tdecomp.SplitSVD(parts=2)], ids=repr)
def test_quantized_factors_are_refused_in_words(method):
    small = nn.Sequential(chain_of(layer_with_values(nn.Linear(10, 8), torch.float32), method))
    small = torch.ao.quantization.quantize_dynamic(small, {nn.Linear})
    with pytest.raises(ValueError, match=r"layer '0' \(Linear\(10→8\)\): its Linear is quantized"):
        tdecomp.factor_decay(small, 1e-4)


class Adapted(nn.Module):
    """As adapters are: around a layer, whose weight it shows, and adds to."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.more = layer, copy.deepcopy(layer)

    @property
    def weight(self):
        return self.layer.weight

    @property
    def bias(self):
        return self.layer.bias

    def forward(self, x):
        return self.layer(x) + self.more(x)


def test_what_an_adapter_adds_to_a_factor_counts():
    chain = chain_of(layer_with_values(nn.Linear(10, 8)), "svd")
    plain = tdecomp.factor_decay(chain, 1.0)
    chain[0] = Adapted(chain[0])
    found = tdecomp.factor_decay(chain, 1.0)
    torch.testing.assert_close(found, 4 * plain)  # one factor is twice what it was
    found.backward()
    assert chain[0].more.weight.grad.any()
