"""The factorized layers: made, filled, reduced, trained on and copied."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional

from tdecomp.composer.core import LowRankSolution
from tdecomp.composer.modules import FactorizedConv2d, FactorizedLinear, factorizing_could_speedup
from tests.composer.oracle import best, directly, flat
from tests.unchanged import unchanged

# The modules --------------------------------------------------------------------------------------


def linear(bias=True, latent=8):
    return FactorizedLinear.from_linear(nn.Linear(24, 32, bias=bias), latent_features=latent)


def conv(bias=True, latent=6):
    layer = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=bias)
    return FactorizedConv2d.from_conv2d(layer, latent_channels=latent)


CASES = {"linear": (linear, (50, 24)), "conv": (conv, (4, 8, 9, 9))}


@pytest.mark.parametrize("bias", [True, False])
def test_the_layers_within(bias):
    layer = FactorizedLinear(24, 32, bias, 0.25)
    assert (layer.in_features, layer.out_features, layer.latent_features) == (24, 32, 6)
    assert layer.module0.bias is None
    assert (layer.module1.bias is not None) == bias
    maps = FactorizedConv2d(8, 12, (3, 2), 4, bias=bias, stride=2, padding=(1, 0), dilation=2)
    assert (maps.in_channels, maps.out_channels, maps.latent_channels) == (8, 12, 4)
    assert maps.module0.bias is None
    assert (maps.module1.bias is not None) == bias
    assert maps.module1.kernel_size == maps.module1.stride == (1, 1)
    whole = nn.Conv2d(8, 12, (3, 2), stride=2, padding=(1, 0), dilation=2)
    x = torch.randn(2, 8, 9, 9)
    assert maps(x).shape == whole(x).shape
    keys = {"module0.weight", "module1.weight"} | ({"module1.bias"} if bias else set())
    assert set(layer.state_dict()) == set(maps.state_dict()) == keys


def test_latent_sizes_that_save_nothing_are_refused():
    largest = FactorizedLinear.max_allowed_latent_features(24, 32)
    assert largest * (24 + 32) < 24 * 32 <= (largest + 1) * (24 + 32)
    assert FactorizedLinear(24, 32, latent_features=largest).latent_features == largest
    with pytest.raises(ValueError, match=f"{largest + 1} saves no MACs.*{largest}"):
        FactorizedLinear(24, 32, latent_features=largest + 1)
    assert FactorizedLinear.max_allowed_latent_features(16, 16) == 7  # at 8 it breaks even
    assert FactorizedLinear.max_allowed_latent_channels(16, 16) == 7
    for size in (3, (3, 3)):
        assert FactorizedConv2d.max_allowed_latent_channels(8, 12, size) == 10
        assert FactorizedConv2d.max_allowed_latent_features(8, 12, size) == 10
    assert FactorizedConv2d(8, 12, 3, 10).latent_channels == 10
    with pytest.raises(ValueError, match="latent_channels: 11 saves no MACs"):
        FactorizedConv2d(8, 12, 3, 11)
    with pytest.raises(ValueError, match="saves no MACs"):
        FactorizedLinear(1, 8)
    with pytest.raises(NotImplementedError, match="groups: got 2"):
        FactorizedConv2d(8, 12, 3, groups=2)
    with pytest.raises(TypeError, match="latent_features: got None"):
        FactorizedLinear(8, 8, latent_features=None)


def test_fractions_are_of_the_narrower_side():
    assert FactorizedLinear(64, 32).latent_features == 8
    assert FactorizedLinear(32, 64, latent_features=0.01).latent_features == 1
    assert FactorizedConv2d(16, 64, 3).latent_channels == 4
    assert FactorizedConv2d(64, 16, 3, 0.5).latent_channels == 8


@pytest.mark.parametrize("bias", [True, False])
def test_trained_weights_are_kept(bias):
    layer = nn.Linear(24, 32, bias=bias)
    made = FactorizedLinear.from_linear(layer, latent_features=8)
    product = made.module1.weight @ made.module0.weight
    lost = float((layer.weight - product).detach().double().square().sum())
    assert lost == pytest.approx(best(layer.weight.detach(), 8), rel=1e-5)
    maps = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=bias, padding_mode="circular")
    made_maps = FactorizedConv2d.from_conv2d(maps, 3, latent_channels=10)
    product = made_maps.module1.weight.flatten(1) @ made_maps.module0.weight.flatten(1)
    lost = float((maps.weight.flatten(1) - product).detach().double().square().sum())
    assert lost == pytest.approx(best(maps.weight.detach().flatten(1), 10), rel=1e-5)
    assert made_maps.module0.padding_mode == "circular"
    for new, old in ((made, layer), (made_maps, maps)):
        assert (new.module1.bias is None) == (old.bias is None)
        assert old.bias is None or torch.equal(new.module1.bias, old.bias)


def test_or_not_when_asked():
    layer = nn.Linear(24, 32)
    nn.init.constant_(layer.weight, 100.0)
    fresh = FactorizedLinear.from_linear(layer, latent_features=8, keep_weights=False)
    assert float(fresh.module0.weight.detach().abs().max()) <= 24**-0.5
    assert float(fresh.module1.bias.detach().std()) > 0
    maps = nn.Conv2d(8, 12, 3)
    nn.init.constant_(maps.weight, 100.0)
    fresh = FactorizedConv2d.from_conv2d(maps, keep_weights=False)
    assert 0 < float(fresh.module0.weight.detach().abs().max()) <= 72**-0.5
    before = fresh.module0.weight.clone()
    fresh.reset_parameters()
    assert not torch.equal(before, fresh.module0.weight)


def test_keeping_weights_draws_no_random_numbers():
    layer, maps = nn.Linear(24, 32), nn.Conv2d(8, 12, 3)
    before = torch.get_rng_state()
    FactorizedLinear.from_linear(layer)
    FactorizedConv2d.from_conv2d(maps)
    assert torch.equal(before, torch.get_rng_state())


def test_a_layers_ways_are_kept():
    layer = nn.Linear(24, 32).double().eval()
    layer.weight.requires_grad_(False)
    made = FactorizedLinear.from_linear(layer)
    assert made.module0.weight.dtype == torch.float64
    assert not made.training
    assert not made.module1.training
    assert not made.module0.weight.requires_grad
    assert not made.module1.weight.requires_grad
    assert made.module1.bias.requires_grad
    maps = FactorizedConv2d.from_conv2d(
        nn.Conv2d(8, 12, 3).to(memory_format=torch.channels_last), latent_channels=6
    )
    maps.set_rank(torch.randn(2, 8, 5, 5), 3)
    assert maps.module0.weight.is_contiguous(memory_format=torch.channels_last)
    assert not maps.module0.weight.is_contiguous()
    frozen = nn.Linear(24, 32)
    frozen.bias.requires_grad_(False)
    assert not FactorizedLinear.from_linear(frozen).module1.bias.requires_grad
    half = FactorizedLinear.from_linear(nn.Linear(24, 32).bfloat16())
    half.set_rank(torch.randn(10, 24).bfloat16(), 2)
    assert half(torch.randn(3, 24).bfloat16()).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"expected an nn.Linear, got Conv2d"):
        FactorizedLinear.from_linear(nn.Conv2d(8, 8, 3))
    with pytest.raises(TypeError, match=r"expected an nn.Conv2d, got Linear"):
        FactorizedConv2d.from_conv2d(nn.Linear(8, 8))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_set_rank_changes_the_outputs_least(case, bias):
    make, shape = case
    layer = make(bias).double()
    x = (torch.randn(shape) + 1).double()
    with torch.no_grad():
        y = layer(x)
        solution = layer.solution_for_rank(x, 3)
        assert torch.equal(layer(x), y)  # still as it was
        layer.set_rank(x, 3)
        got = layer(x)
    rows = y if y.dim() == 2 else flat(y)
    assert float((y - got).square().sum()) == pytest.approx(best(rows, 3, bias), rel=1e-8)
    assert solution.nmse == pytest.approx(directly(y, got), rel=1e-8)
    assert layer.latent_size == layer.rank == 3
    wide = layer.module0.out_features if shape[1] == 24 else layer.module0.out_channels
    narrow = layer.module1.in_features if shape[1] == 24 else layer.module1.in_channels
    assert wide == narrow == 3


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_set_rank_within_its_limits(case):
    make, shape = case
    layer, x = make(), torch.randn(shape)
    latent = layer.latent_size
    layer(x).sum().backward()
    with unchanged(layer):
        layer.set_rank(x, latent)
        with pytest.raises(ValueError, match=f"rank: got {latent + 1}; expected at most {latent}"):
            layer.set_rank(x, latent + 1)
        for wrong in (-1, 1.5):
            with pytest.raises(ValueError, match="rank: got"):
                layer.set_rank(x, wrong)
        with pytest.raises(ValueError, match="got"):
            layer.set_rank(torch.randn(3, 5, 7, 7), 1)
        kept = layer.solution_for_rank(x, latent + 1)
        assert kept.rank == -1
        assert kept.nmse < 1e-9
    layer.apply_solution(kept)
    assert layer.latent_size == latent
    assert layer.should_factorize(latent - 1)
    assert not layer.should_factorize(latent)
    layer.set_rank(x, 1)
    assert not layer.should_factorize(0.01)


def test_inputs_of_other_shapes():
    layer = linear()
    layer.set_rank(torch.randn(2, 3, 5, 24), 6)
    layer.set_rank(torch.randn(24), 5)
    layer.set_rank(torch.randn(7, 24).bfloat16(), 4)
    maps = conv()
    maps.set_rank(torch.randn(8, 9, 9), 4)
    assert (layer.latent_features, maps.latent_channels) == (4, 4)


def test_solutions_that_do_not_fit_are_refused():
    layer, bare, maps = linear(), linear(bias=False), conv()
    x = torch.randn(50, 24)
    good = layer.solution_for_rank(x, 3)
    whole = LowRankSolution(good.Wa)
    other = FactorizedLinear(24, 30, latent_features=4).solution_for_rank(x, 3)
    for module, solution, words in (
        (layer, whole, "no Wa or no Wb"),
        (layer, other, "do not fit Linear"),
        (layer, maps.solution_for_rank(torch.randn(2, 8, 9, 9), 3), "do not fit"),
        (maps, good, "do not fit Conv2d"),
        (bare, good, r"\(32,\)\], which do not fit Linear\(24→32, no bias\)"),
        (layer, LowRankSolution(good.Wa, good.Wb, torch.ones(5)), r"\(5,\)\], which do not fit"),
    ):
        with unchanged(module), pytest.raises(ValueError, match=words):
            module.apply_solution(solution)
    layer.apply_solution(LowRankSolution(good.Wa, good.Wb))
    assert torch.equal(layer.module1.bias, torch.zeros(32))
    nn.utils.parametrizations.weight_norm(bare.module0)
    with pytest.raises(ValueError, match="computes its weight"):
        bare.apply_solution(LowRankSolution(good.Wa, good.Wb))


def test_a_solution_is_copied():
    layer = conv()
    solution = layer.solution_for_rank(torch.randn(4, 8, 9, 9), 3)
    before = solution.Wa.clone()
    layer.apply_solution(solution)
    nn.init.zeros_(layer.module0.weight)
    assert torch.equal(solution.Wa, before)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_training_goes_on(case):
    make, shape = case
    layer, x = make(), torch.randn(shape)
    target = torch.randn_like(layer(x).detach())
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)

    def step():
        optimizer.zero_grad()
        loss = functional.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        return loss.item()

    step()
    parameters = list(layer.parameters())
    layer.set_rank(x, 3)
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
    assert parameters[0].grad is None
    for parameter in parameters:
        optimizer.state.pop(parameter, None)  # as the docstring says
    losses = [step() for _ in range(20)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_copies_pickles_and_state_dicts(case):
    make, shape = case
    layer, x = make(), torch.randn(shape)
    layer.set_rank(x, 3)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    fresh = make(latent=3)
    fresh.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False), fresh):
        assert torch.equal(twin(x), layer(x))
        assert twin.latent_size == 3
        twin.set_rank(x, 2)
        assert twin.latent_size == 2
    assert layer.latent_size == 3
    assert "rank=3" in repr(layer)


def test_what_could_be_faster():
    assert factorizing_could_speedup(nn.Linear(16, 16), 7)
    assert not factorizing_could_speedup(nn.Linear(16, 16), 8)
    assert factorizing_could_speedup(nn.Linear(16, 64), 0.5)
    assert not factorizing_could_speedup(nn.Linear(16, 64), 0.9)
    assert factorizing_could_speedup(nn.Conv2d(8, 12, 3), 10)
    assert not factorizing_could_speedup(nn.Conv2d(8, 12, 3), 11)
    assert not factorizing_could_speedup(nn.Conv2d(8, 12, 3, groups=2), 1)
    for other in (nn.ReLU(), nn.Conv1d(8, 8, 3), nn.ConvTranspose2d(8, 8, 3), nn.Identity()):
        assert not factorizing_could_speedup(other, 1)
    assert factorizing_could_speedup(linear(), 7)
    assert not factorizing_could_speedup(linear(), 8)
    assert not factorizing_could_speedup(conv(), 6)
    with pytest.raises(ValueError, match="latent_size: got -3"):
        factorizing_could_speedup(nn.Linear(16, 16), -3)


def test_layers_made_in_inference_mode_can_be_trained():
    layer = nn.Linear(16, 16)
    with torch.inference_mode():
        made = FactorizedLinear.from_linear(layer, latent_features=4)
    made(torch.randn(2, 16)).sum().backward()
    assert made.module0.weight.grad is not None
