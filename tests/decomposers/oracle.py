"""What every decomposer must do, checked against torch's own layers; each method subclasses it."""

import itertools
import math
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tdecomp.chain import Chain
from tdecomp.cost import chain_cost
from tdecomp.decomposers import Decomposer
from tdecomp.layer import STOCK_LAYERS, LayerSpec
from tests.geometries import GEOMETRIES

# torch says so of the layer itself: padding="same" with an even kernel copies the input.
SAME_PADDING_OF_EVEN_KERNELS = "ignore:Using padding='same' with even kernel:UserWarning"

HALF_TO_DOUBLE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}


def distance(actual, expected):
    """‖actual - expected‖ / ‖expected‖ without leaving the range of the dtype."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    scale = expected.abs().max().item() or 1.0
    return ((actual - expected) / scale).norm().item() / ((expected / scale).norm().item() or 1.0)


def middle(largest):
    return max(1, largest // 2)


class DecomposerCase:
    """A method's class sets the attributes; `takes` says which layers the method is for."""

    decomposer: ClassVar[Decomposer]
    drawn: ClassVar[st.SearchStrategy]  # geometries that it takes
    dense: ClassVar[LayerSpec]  # a layer that it takes, with room for some ranks
    least_error: ClassVar[float] = 0.0  # relative, where a smaller one is not promised

    def takes(self, spec):
        raise NotImplementedError

    def ranks(self, spec):
        """The smallest, the largest and something in between."""
        largest = self.decomposer.max_rank(spec)
        return sorted({1, middle(largest), largest})

    def wrong_ranks(self, largest):
        return [0, -1, largest + 1, True, 1.0, (1, 1), (1,), ()]

    def pytest_generate_tests(self, metafunc):
        if "geometry" in metafunc.fixturenames:
            taken = [g for g in GEOMETRIES if self.takes(g.spec)]
            metafunc.parametrize("geometry", taken, ids=str)

    def weight(self, spec, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(spec.weight_shape, generator=generator).to(dtype)

    # -- the oracle ---------------------------------------------------------------------------

    def check_against_the_layer(self, geometry, rank):
        """Outputs and gradients are those of the layer with the factorized kernel in it."""
        layer, spec = geometry.layer(), geometry.spec
        factorization = self.decomposer.factorize(layer.weight, spec, rank)
        kernel = factorization.to_kernel()
        assert kernel.shape == layer.weight.shape
        assert kernel.dtype == layer.weight.dtype
        chain = self.decomposer.assemble(layer, factorization, rank)
        reference = geometry.layer()
        reference.weight.data = kernel

        x = geometry.input(2).requires_grad_()
        expected = reference(x)
        cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).double()
        (expected_gradient,) = torch.autograd.grad((expected * cotangent).sum(), x)
        actual = chain(x)
        (actual * cotangent).sum().backward()

        assert distance(actual, expected) < 1e-10
        assert distance(x.grad, expected_gradient) < 1e-10
        for name, parameter in chain.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
        assert distance(chain(x[0]), expected[0]) < 1e-10
        if not spec.ndim:
            assert distance(chain(x[None]), expected[None]) < 1e-10

    @pytest.mark.filterwarnings(SAME_PADDING_OF_EVEN_KERNELS)
    def test_chain_equals_the_layer_with_the_factorized_kernel(self, geometry):
        for rank in self.ranks(geometry.spec):
            self.check_against_the_layer(geometry, rank)

    def check_drawn(self, data):
        geometry = data.draw(self.drawn)
        rank = data.draw(st.sampled_from(self.ranks(geometry.spec)))
        self.check_against_the_layer(geometry, rank)

    @pytest.mark.filterwarnings(SAME_PADDING_OF_EVEN_KERNELS)
    @given(data=st.data())
    def test_drawn_chains_equal_the_layer(self, data):
        self.check_drawn(data)

    @pytest.mark.slow
    @pytest.mark.filterwarnings(SAME_PADDING_OF_EVEN_KERNELS)
    @settings(max_examples=1000)
    @given(data=st.data())
    def test_many_drawn_chains_equal_the_layer(self, data):
        self.check_drawn(data)

    # -- structure and cost -------------------------------------------------------------------

    @pytest.mark.filterwarnings(SAME_PADDING_OF_EVEN_KERNELS)
    def test_cost_is_what_torch_counts(self, geometry):
        layer, spec = geometry.layer(), geometry.spec
        inputs = [geometry.input(2), geometry.input(3)]
        for rank in self.ranks(spec):
            chain = self.decomposer.build(spec, rank, dtype=torch.float64)
            with FlopCounterMode(display=False) as counter:
                shapes = [chain(x).shape for x in inputs]
            cost = chain_cost(
                self.decomposer.stages(spec, rank), [spec.call(x.shape) for x in inputs]
            )
            assert cost.macs == counter.get_total_flops() // 2
            assert cost.params == sum(p.numel() for p in chain.parameters())
            assert shapes == [layer(x).shape for x in inputs]

    def test_chain_is_made_of_stock_layers(self, geometry):
        layer, spec = geometry.layer(), geometry.spec
        rank = self.ranks(spec)[0]
        chain = self.decomposer.assemble(
            layer, self.decomposer.factorize(layer.weight, spec, rank), rank
        )
        assert isinstance(chain, Chain)
        assert (chain.method, chain.rank, chain.replaced) == (self.decomposer.name, rank, spec)
        assert all(type(stage) in STOCK_LAYERS for stage in chain)
        *first, last = chain
        assert all(stage.bias is None for stage in first)
        assert (last.bias is None) == (layer.bias is None)
        if layer.bias is not None:
            assert torch.equal(last.bias, layer.bias)
            assert last.bias is not layer.bias

    @pytest.mark.parametrize("training", [True, False])
    def test_chain_keeps_what_the_layer_was(self, training):
        layer = self.dense.build(dtype=torch.float64).train(training)
        nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
        layer.weight.requires_grad_(not training)
        layer.bias.requires_grad_(training)
        rank = self.ranks(self.dense)[0]
        factorization = self.decomposer.factorize(layer.weight, self.dense, rank)
        chain = self.decomposer.assemble(layer, factorization, rank)
        assert all(module.training is training for module in chain.modules())
        assert all(stage.weight.requires_grad is not training for stage in chain)
        assert chain[-1].bias.requires_grad is training

    @pytest.mark.parametrize("any_geometry", GEOMETRIES, ids=str)
    def test_refusal_says_which_layers_it_takes(self, any_geometry):
        reason = self.decomposer.refusal(any_geometry.spec)
        if self.takes(any_geometry.spec):
            assert reason is None
        else:
            assert self.decomposer.name in reason

    # -- ranks --------------------------------------------------------------------------------

    def test_largest_useful_rank_can_be_fitted_and_one_more_cannot(self, geometry):
        spec = geometry.spec
        largest = self.decomposer.max_rank(spec)
        self.decomposer.check_rank(largest, spec)
        for wrong in self.wrong_ranks(largest):
            with pytest.raises(ValueError, match=self.decomposer.name):
                self.decomposer.factorize(geometry.layer().weight, spec, wrong)

    def test_error_of_a_wrong_rank_says_what_was_got_and_what_is_expected(self):
        largest = self.decomposer.max_rank(self.dense)
        wrong = self.wrong_ranks(largest)[2]
        with pytest.raises(ValueError, match="largest useful rank") as error:
            self.decomposer.check_rank(wrong, self.dense)
        for part in (str(wrong), str(largest), str(self.dense)):
            assert part in str(error.value)

    # -- the fit ------------------------------------------------------------------------------

    def test_fit_is_deterministic_and_leaves_the_generators_alone(self):
        weight = self.weight(self.dense)
        for rank in self.ranks(self.dense):
            first = self.decomposer.factorize(weight, self.dense, rank).stage_weights()
            torch.manual_seed(99)
            np.random.seed(99)  # noqa: NPY002  TensorLy's own choice of generator
            states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
            second = self.decomposer.factorize(weight, self.dense, rank).stage_weights()
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            assert torch.equal(states[0], torch.get_rng_state())
            assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002

    def test_fit_leaves_the_weight_alone(self):
        weight = nn.Parameter(self.weight(self.dense))
        before = weight.detach().clone()
        factorization = self.decomposer.factorize(weight, self.dense, self.ranks(self.dense)[-1])
        assert torch.equal(weight, before)
        assert not any(w.requires_grad for w in factorization.stage_weights())

    def test_groups_are_fitted_one_by_one(self):
        spec = replace(
            self.dense,
            in_channels=2 * self.dense.in_channels,
            out_channels=2 * self.dense.out_channels,
            groups=2,
        )
        parts = [self.weight(self.dense, seed=seed) for seed in (0, 1)]
        rank = self.ranks(self.dense)[1]
        assert self.decomposer.max_rank(spec) == self.decomposer.max_rank(self.dense)
        alone = [self.decomposer.factorize(p, self.dense, rank).to_kernel() for p in parts]
        both = self.decomposer.factorize(torch.cat(parts), spec, rank).to_kernel()
        assert torch.equal(both, torch.cat(alone))

    @pytest.mark.parametrize("scale", [1e-8, 3.0])
    def test_scaled_factors_are_those_of_the_scaled_kernel(self, scale):
        rank = self.ranks(self.dense)[1]
        (factors,) = self.decomposer.factorize(self.weight(self.dense), self.dense, rank).groups
        assert distance(factors.scaled(scale).to_kernel(), scale * factors.to_kernel()) < 1e-12

    # -- numbers that don't cooperate -----------------------------------------------------------

    @pytest.mark.parametrize("dtype", list(HALF_TO_DOUBLE), ids=str)
    def test_chain_has_the_dtype_of_the_layer(self, dtype):
        layer = self.dense.build(dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(self.weight(self.dense))
            layer.bias.zero_()
        for rank in self.ranks(self.dense):
            factorization = self.decomposer.factorize(layer.weight, self.dense, rank)
            kernel = factorization.to_kernel()
            chain = self.decomposer.assemble(layer, factorization, rank)
            assert {p.dtype for p in chain.parameters()} == {kernel.dtype} == {dtype}
            assert torch.isfinite(kernel).all()

    @pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_scale_of_the_kernel_does_not_matter(self, scale, dtype, bound):
        weight = self.weight(self.dense).to(dtype).double()
        for rank in self.ranks(self.dense):
            usual = self.decomposer.factorize(weight.to(dtype), self.dense, rank)
            scaled = self.decomposer.factorize((weight * scale).to(dtype), self.dense, rank)
            assert all(torch.isfinite(w).all() for w in scaled.stage_weights())
            # The rounding of bfloat16 differs from scale to scale, so the error is what counts.
            lost = distance(usual.to_kernel(), weight)
            assert distance(scaled.to_kernel(), weight * scale) == pytest.approx(lost, abs=bound)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_zero_kernel(self, dtype):
        for rank in self.ranks(self.dense):
            weight = self.weight(self.dense, dtype) * 0
            factorization = self.decomposer.factorize(weight, self.dense, rank)
            assert all(torch.isfinite(w).all() for w in factorization.stage_weights())
            assert not factorization.to_kernel().any()

    @pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
    @pytest.mark.parametrize("zeros", [False, True], ids=["dense", "dead-channels"])
    def test_kernel_of_rank_one_is_exact_at_every_rank(self, dtype, bound, zeros):
        bound = max(bound, self.least_error)
        generator = torch.Generator().manual_seed(3)
        weight = torch.ones((), dtype=torch.float64)
        for size in self.dense.weight_shape:
            weight = weight[..., None] * torch.randn(size, generator=generator).double()
        if zeros:
            weight[1], weight[:, 0] = 0, 0
        for rank in self.ranks(self.dense):
            factorization = self.decomposer.factorize(weight.to(dtype), self.dense, rank)
            assert all(torch.isfinite(w).all() for w in factorization.stage_weights())
            assert distance(factorization.to_kernel(), weight) < bound

    def test_constant_kernel_is_exact(self):
        weight = torch.ones(self.dense.weight_shape)
        for rank in self.ranks(self.dense):
            factorization = self.decomposer.factorize(weight, self.dense, rank)
            assert distance(factorization.to_kernel(), weight) < 1e-5


class ExactMethodCase(DecomposerCase):
    """Methods that lose nothing at their largest useful rank."""

    @pytest.mark.parametrize(
        "dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str
    )
    def test_full_rank_equals_the_layer(self, geometry, dtype, bound):
        layer, spec = geometry.layer(dtype), geometry.spec
        rank = self.decomposer.max_rank(spec)
        factorization = self.decomposer.factorize(layer.weight, spec, rank)
        assert distance(factorization.to_kernel(), layer.weight) < bound
        chain = self.decomposer.assemble(layer, factorization, rank)
        x = geometry.input(2, dtype=dtype)
        with torch.no_grad():
            assert distance(chain(x), layer(x)) < bound

    @pytest.mark.parametrize("dtype, bound", list(HALF_TO_DOUBLE.items()), ids=str)
    def test_full_rank_is_exact_in_every_dtype(self, dtype, bound):
        weight = self.weight(self.dense, dtype)
        rank = self.decomposer.max_rank(self.dense)
        kernel = self.decomposer.factorize(weight, self.dense, rank).to_kernel()
        assert distance(kernel, weight) < bound


class MatrixMethodCase(ExactMethodCase):
    """Methods that are a truncated SVD of one matrix per group."""

    def matrix(self, kernel):
        """The matrix of one group's kernel (out, in, *kernel), as NumPy sees it."""
        raise NotImplementedError

    def group_singular_values(self, geometry):
        spec = geometry.spec
        kernel = spec.to_forward_layout(geometry.layer().weight.detach()).numpy()
        groups = np.split(kernel, spec.groups)
        return np.stack([np.linalg.svd(self.matrix(k), compute_uv=False) for k in groups])

    def test_is_optimal_and_its_error_falls_with_rank(self, geometry):
        weight, spec = geometry.layer().weight, geometry.spec
        values = self.group_singular_values(geometry)
        largest = self.decomposer.max_rank(spec)
        assert values.shape == (spec.groups, largest)
        errors = []
        for rank in range(1, largest + 1):
            kernel = self.decomposer.factorize(weight, spec, rank).to_kernel()
            errors.append((kernel - weight).norm().item())
            tail = math.sqrt((values[:, rank:] ** 2).sum())
            assert errors[-1] == pytest.approx(tail, rel=1e-9, abs=1e-9)
        assert all(b < a for a, b in itertools.pairwise(errors))

    def test_spectrum_is_that_of_the_matrix(self, geometry):
        spec = geometry.spec
        (spectrum,) = self.decomposer.spectra(geometry.layer().weight, spec)
        values = self.group_singular_values(geometry)
        assert sorted(spectrum.shape)[0] == values.shape[1]
        assert math.prod(spectrum.shape) == math.prod(spec.weight_shape) // spec.groups
        scale = float(geometry.layer().weight.detach().abs().max())
        np.testing.assert_allclose(spectrum.squares * scale**2, values**2, rtol=1e-9, atol=1e-9)

    def test_both_layers_share_the_norm(self):
        rank = self.ranks(self.dense)[1]
        first, second = self.decomposer.factorize(
            self.weight(self.dense), self.dense, rank
        ).stage_weights()
        assert first.norm().item() == pytest.approx(second.norm().item())
