"""Tests that every decomposer passes, against torch's own layers; each method subclasses them."""

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
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tdecomp.decomposers.assemble import assemble, empty_chain
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.fit_layer import factorize, spectra_of
from tdecomp.layers.chain import Chain
from tdecomp.layers.cost import chain_cost
from tdecomp.layers.spec import LayerSpec
from tdecomp.layers.stock import STOCK_LAYERS
from tdecomp.linalg.second_moment import SecondMoment
from tests.geometries import GEOMETRIES, case

# torch says so of the layer itself: padding="same" with an even kernel copies the input.
SAME_PADDING_OF_EVEN_KERNELS = "ignore:Using padding='same' with even kernel:UserWarning"

HALF_TO_DOUBLE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}

# What a layer may see: enough, fewer samples than inputs, a dead channel, inputs that are copies.
MOMENT_KINDS = ("full", "few", "dead", "copied")


def distance(actual, expected):
    """‖actual - expected‖ / ‖expected‖ without leaving the range of the dtype."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    scale = expected.abs().max().item() or 1.0
    return ((actual - expected) / scale).norm().item() / ((expected / scale).norm().item() or 1.0)


def tensors(factors):
    """All tensors of a fit, stage by stage."""
    return tree_leaves(factors.stage_weights())


def middle(largest):
    return max(1, largest // 2)


# torch warns once in a process, so that any of these tests may be the first.
@pytest.mark.filterwarnings(SAME_PADDING_OF_EVEN_KERNELS)
class DecomposerCase:
    """A method's class sets the attributes; `takes` says which layers the method is for."""

    decomposer: ClassVar[Decomposer]
    drawn: ClassVar[st.SearchStrategy]  # geometries that it takes
    dense: ClassVar[LayerSpec]  # a layer that it takes, with room for some ranks
    least_error: ClassVar[float] = 0.0  # relative, where a smaller one is not promised
    stage_types: ClassVar[tuple[type[nn.Module], ...]] = STOCK_LAYERS

    @property
    def fitter(self):
        """The method with as many iterations as a fit to data is judged by."""
        return self.decomposer

    def takes(self, spec):
        raise NotImplementedError

    def ranks(self, spec):
        """The smallest, the largest and something in between."""
        largest = self.decomposer.max_rank(spec)
        return sorted({1, middle(largest), largest})

    def wrong_ranks(self, largest):
        return [0, -1, largest + 1, True, 1.0, (1, 1), (1,), ()]

    def taken(self):
        """The geometries that the method takes."""
        return [geometry for geometry in GEOMETRIES if self.takes(geometry.spec)]

    def pytest_generate_tests(self, metafunc):
        if "geometry" in metafunc.fixturenames:
            metafunc.parametrize("geometry", self.taken(), ids=str)

    def weight(self, spec, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(spec.weight_shape, generator=generator).to(dtype)

    def of_rank_one(self, values):
        """A kernel for which rank 1 is enough; `values` gives the entries along a size."""
        weight = torch.ones((), dtype=torch.float64)
        for size in self.dense.weight_shape:
            weight = weight[..., None] * values(size)
        return weight

    # -- the oracle ---------------------------------------------------------------------------

    def check_against_the_layer(self, geometry, rank):
        """Outputs and gradients are those of the layer with the factorized kernel in it."""
        layer, spec = geometry.layer(), geometry.spec
        factorization = factorize(self.decomposer, layer.weight, spec, rank)
        kernel = factorization.to_kernel()
        assert kernel.shape == layer.weight.shape
        assert kernel.dtype == layer.weight.dtype
        chain = assemble(layer, self.decomposer, rank, factorization)
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

    def test_chain_equals_the_layer_with_the_factorized_kernel(self, geometry):
        for rank in self.ranks(geometry.spec):
            self.check_against_the_layer(geometry, rank)

    def check_drawn(self, data):
        geometry = data.draw(self.drawn)
        rank = data.draw(st.sampled_from(self.ranks(geometry.spec)))
        self.check_against_the_layer(geometry, rank)

    @given(data=st.data())
    def test_drawn_chains_equal_the_layer(self, data):
        self.check_drawn(data)

    @pytest.mark.slow
    @settings(max_examples=1000)
    @given(data=st.data())
    def test_many_drawn_chains_equal_the_layer(self, data):
        self.check_drawn(data)

    # -- structure and cost -------------------------------------------------------------------

    def test_cost_is_what_torch_counts(self):
        for geometry in self.taken():
            with case(geometry):
                layer, spec = geometry.layer(), geometry.spec
                inputs = [geometry.input(2), geometry.input(3)]
                for rank in self.ranks(spec):
                    chain = empty_chain(self.decomposer, spec, rank, dtype=torch.float64)
                    with FlopCounterMode(display=False) as counter:
                        shapes = [chain(x).shape for x in inputs]
                    cost = chain_cost(
                        self.decomposer.stages(spec, rank), [spec.call(x.shape) for x in inputs]
                    )
                    assert cost.macs == counter.get_total_flops() // 2
                    assert cost.params == sum(p.numel() for p in chain.parameters())
                    assert shapes == [layer(x).shape for x in inputs]

    def test_chain_is_made_of_its_stages(self):
        for geometry in self.taken():
            with case(geometry):
                layer, spec = geometry.layer(), geometry.spec
                rank = self.ranks(spec)[0]
                factorization = factorize(self.decomposer, layer.weight, spec, rank)
                chain = assemble(layer, self.decomposer, rank, factorization)
                assert isinstance(chain, Chain)
                assert (chain.method, chain.rank, chain.replaced) == (
                    self.decomposer.name,
                    rank,
                    spec,
                )
                assert chain.decomposer is self.decomposer
                assert all(type(stage) in self.stage_types for stage in chain)
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
        factorization = factorize(self.decomposer, layer.weight, self.dense, rank)
        chain = assemble(layer, self.decomposer, rank, factorization)
        assert all(module.training is training for module in chain.modules())
        weights = [p for name, p in chain.named_parameters() if not name.endswith("bias")]
        assert all(weight.requires_grad is not training for weight in weights)
        assert chain[-1].bias.requires_grad is training

    def test_refusal_says_which_layers_it_takes(self):
        for geometry in GEOMETRIES:
            with case(geometry):
                reason = self.decomposer.refusal(geometry.spec)
                if self.takes(geometry.spec):
                    assert reason is None
                else:
                    assert self.decomposer.name in reason

    # -- ranks --------------------------------------------------------------------------------

    def test_largest_useful_rank_can_be_fitted_and_one_more_cannot(self):
        for geometry in self.taken():
            with case(geometry):
                spec = geometry.spec
                largest = self.decomposer.max_rank(spec)
                self.decomposer.check_rank(largest, spec)
                for wrong in self.wrong_ranks(largest):
                    with pytest.raises(ValueError, match=self.decomposer.name):
                        factorize(self.decomposer, geometry.layer().weight, spec, wrong)

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
            first = tensors(factorize(self.decomposer, weight, self.dense, rank))
            torch.manual_seed(99)
            np.random.seed(99)  # noqa: NPY002  TensorLy's own choice of generator
            states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
            second = tensors(factorize(self.decomposer, weight, self.dense, rank))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            assert torch.equal(states[0], torch.get_rng_state())
            assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002

    def test_fit_leaves_the_weight_alone(self):
        weight = nn.Parameter(self.weight(self.dense))
        before = weight.detach().clone()
        factorization = factorize(self.decomposer, weight, self.dense, self.ranks(self.dense)[-1])
        assert torch.equal(weight, before)
        assert not any(w.requires_grad for w in tensors(factorization))

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
        alone = [factorize(self.decomposer, p, self.dense, rank).to_kernel() for p in parts]
        both = factorize(self.decomposer, torch.cat(parts), spec, rank).to_kernel()
        assert torch.equal(both, torch.cat(alone))

    def test_fit_that_starts_from_a_draft_is_as_good(self):
        weight = self.weight(self.dense)
        for rank in self.ranks(self.dense):
            draft = factorize(self.fitter, weight, self.dense, rank, draft=True)
            errors = [
                distance(
                    factorize(self.fitter, weight, self.dense, rank, start=s).to_kernel(), weight
                )
                for s in (draft, None)
            ]
            assert errors[0] <= 1.02 * errors[1] + 1e-6

    @pytest.mark.parametrize("scale", [1e-8, 3.0])
    def test_scaled_factors_are_those_of_the_scaled_kernel(self, scale):
        rank = self.ranks(self.dense)[1]
        (factors,) = factorize(self.decomposer, self.weight(self.dense), self.dense, rank).groups
        assert distance(factors.scaled(scale).to_kernel(), scale * factors.to_kernel()) < 1e-12

    # -- numbers that don't cooperate -----------------------------------------------------------

    @pytest.mark.parametrize("dtype", list(HALF_TO_DOUBLE), ids=str)
    def test_chain_has_the_dtype_of_the_layer(self, dtype):
        layer = self.dense.build(dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(self.weight(self.dense))
            layer.bias.zero_()
        for rank in self.ranks(self.dense):
            factorization = factorize(self.decomposer, layer.weight, self.dense, rank)
            kernel = factorization.to_kernel()
            chain = assemble(layer, self.decomposer, rank, factorization)
            assert {p.dtype for p in chain.parameters()} == {kernel.dtype} == {dtype}
            assert torch.isfinite(kernel).all()

    @pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_scale_of_the_kernel_does_not_matter(self, scale, dtype, bound):
        weight = self.weight(self.dense).to(dtype).double()
        for rank in self.ranks(self.dense):
            usual = factorize(self.decomposer, weight.to(dtype), self.dense, rank)
            scaled = factorize(self.decomposer, (weight * scale).to(dtype), self.dense, rank)
            assert all(torch.isfinite(w).all() for w in tensors(scaled))
            # The rounding of bfloat16 differs from scale to scale, so the error is what counts.
            lost = distance(usual.to_kernel(), weight)
            assert distance(scaled.to_kernel(), weight * scale) == pytest.approx(lost, abs=bound)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_zero_kernel(self, dtype):
        for rank in self.ranks(self.dense):
            weight = self.weight(self.dense, dtype) * 0
            factorization = factorize(self.decomposer, weight, self.dense, rank)
            assert all(torch.isfinite(w).all() for w in tensors(factorization))
            assert not factorization.to_kernel().any()

    @pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
    @pytest.mark.parametrize("zeros", [False, True], ids=["dense", "dead-channels"])
    def test_kernel_of_rank_one_is_exact_at_every_rank(self, dtype, bound, zeros):
        bound = max(bound, self.least_error)
        generator = torch.Generator().manual_seed(3)

        def drawn(size):
            values = torch.randn(size, generator=generator).double()
            return values * (torch.arange(size) != 1) if zeros else values

        weight = self.of_rank_one(drawn)
        assert bool((weight == 0).any()) is zeros
        for rank in self.ranks(self.dense):
            factorization = factorize(self.decomposer, weight.to(dtype), self.dense, rank)
            assert all(torch.isfinite(w).all() for w in tensors(factorization))
            assert distance(factorization.to_kernel(), weight) < bound

    def test_constant_kernel_is_exact(self):
        weight = torch.ones(self.dense.weight_shape)
        for rank in self.ranks(self.dense):
            factorization = factorize(self.decomposer, weight, self.dense, rank)
            assert distance(factorization.to_kernel(), weight) < 1e-5

    # -- the fit to data ------------------------------------------------------------------------

    def rows(self, spec, kind="full", seed=5):
        """Inputs (samples, fan_in) over √samples: many, few, or with dead or copied entries."""
        generator = torch.Generator().manual_seed(seed)
        samples = 4 if kind == "few" else 6 * spec.fan_in
        mixed = torch.randn(spec.fan_in, spec.fan_in, generator=generator).double()
        scales = torch.logspace(0.5, -0.5, spec.fan_in).double()
        rows = torch.randn(samples, spec.fan_in, generator=generator).double() @ (scales * mixed)
        if kind == "dead":
            rows.unflatten(1, (spec.group_in, -1))[:, 0] = 0
        if kind == "copied":
            rows[:, 1::2] = rows[:, ::2][:, : rows[:, 1::2].shape[1]]
        return rows / samples**0.5

    def moment(self, spec, kind="full", seed=5):
        rows = self.rows(spec, kind, seed)
        return SecondMoment(rows=rows) if kind == "few" else SecondMoment(matrix=rows.T @ rows)

    def lost(self, factorization, weight, moments):
        """The share of the outputs' power, summed over groups."""
        spec = factorization.spec
        kernels = weight.double().flatten(1).chunk(spec.groups)
        gone = (weight - factorization.to_kernel()).double().flatten(1).chunk(spec.groups)
        lost = sum(m.lost(d) for m, d in zip(moments, gone, strict=True))
        return lost / sum(m.lost(k) for m, k in zip(moments, kernels, strict=True))

    @pytest.mark.parametrize("kind", MOMENT_KINDS)
    def test_fit_to_data_loses_no_more_of_the_outputs_than_one_to_the_weights(self, kind):
        weight, moments = self.weight(self.dense), [self.moment(self.dense, kind)]
        for rank in self.ranks(self.dense):
            by_weight = factorize(self.fitter, weight, self.dense, rank)
            by_data = factorize(self.fitter, weight, self.dense, rank, moments)
            lost = self.lost(by_data, weight, moments)
            assert lost <= self.lost(by_weight, weight, moments) + 1e-12
            assert all(torch.isfinite(w).all() for w in tensors(by_data))
            shapes = [tuple(w.shape) for w in tensors(by_weight)]
            assert [tuple(w.shape) for w in tensors(by_data)] == shapes

    def test_fit_to_data_gains_where_inputs_are_unequal(self):
        weight, moments = self.weight(self.dense), [self.moment(self.dense)]
        rank = self.ranks(self.dense)[1]
        by_weight = factorize(self.fitter, weight, self.dense, rank)
        by_data = factorize(self.fitter, weight, self.dense, rank, moments)
        assert self.lost(by_data, weight, moments) < 0.95 * self.lost(by_weight, weight, moments)

    def test_rows_and_their_matrix_give_the_same_fit(self):
        weight, rows = self.weight(self.dense), self.rows(self.dense)
        rank = self.ranks(self.dense)[1]
        by_rows, by_matrix = (
            factorize(self.fitter, weight, self.dense, rank, [moment])
            for moment in (SecondMoment(rows=rows), SecondMoment(matrix=rows.T @ rows))
        )
        assert distance(by_rows.to_kernel(), by_matrix.to_kernel()) < 1e-3

    def test_fit_to_data_starts_from_given_factors(self):
        weight, moments = self.weight(self.dense), [self.moment(self.dense)]
        rank = self.ranks(self.dense)[1]
        once = factorize(self.fitter, weight, self.dense, rank, moments)
        again = factorize(self.fitter, weight, self.dense, rank, moments, start=once)
        assert self.lost(again, weight, moments) <= self.lost(once, weight, moments) * (1 + 1e-9)

    @pytest.mark.parametrize("kind", MOMENT_KINDS)
    def test_few_iterations_from_good_factors_keep_what_was_gained(self, kind):
        weight, moments = self.weight(self.dense), [self.moment(self.dense, kind)]
        for rank in self.ranks(self.dense):
            once = factorize(self.fitter, weight, self.dense, rank, moments)
            again = factorize(self.fitter.limited(4), weight, self.dense, rank, moments, once)
            lost, before = (self.lost(f, weight, moments) for f in (again, once))
            assert lost <= before * (1 + 1e-6) + 1e-9

    def test_moment_without_power_leaves_the_fit_to_the_weights(self):
        zero = SecondMoment(matrix=torch.zeros(self.dense.fan_in, self.dense.fan_in).double())
        weight = self.weight(self.dense)
        for rank in self.ranks(self.dense):
            fitted = factorize(self.fitter, weight, self.dense, rank, [zero])
            by_weight = factorize(self.fitter, weight, self.dense, rank)
            lost, least = (distance(f.to_kernel(), weight) for f in (fitted, by_weight))
            assert lost <= least + 1e-6

    def test_groups_are_fitted_to_their_own_data(self):
        spec = replace(
            self.dense,
            in_channels=2 * self.dense.in_channels,
            out_channels=2 * self.dense.out_channels,
            groups=2,
        )
        parts = [self.weight(self.dense, seed=seed) for seed in (0, 1)]
        moments = [self.moment(self.dense, seed=seed) for seed in (5, 6)]
        rank = self.ranks(self.dense)[1]
        alone = [
            factorize(self.fitter, part, self.dense, rank, [moment]).to_kernel()
            for part, moment in zip(parts, moments, strict=True)
        ]
        both = factorize(self.fitter, torch.cat(parts), spec, rank, moments).to_kernel()
        assert torch.equal(both, torch.cat(alone))

    def test_fit_to_data_is_deterministic_and_leaves_everything_alone(self):
        weight, moment = nn.Parameter(self.weight(self.dense)), self.moment(self.dense)
        before = weight.detach().clone(), moment.matrix.clone()
        rank = self.ranks(self.dense)[1]
        first = tensors(factorize(self.fitter, weight, self.dense, rank, [moment]))
        torch.manual_seed(99)
        state = torch.get_rng_state()
        with torch.inference_mode(), torch.autocast("cpu"):
            again = factorize(self.fitter, weight, self.dense, rank, [moment])
        second = tensors(again)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert torch.equal(state, torch.get_rng_state())
        assert torch.equal(weight, before[0])
        assert torch.equal(moment.matrix, before[1])
        assert not any(w.requires_grad or w.is_inference() for w in second)

    @pytest.mark.parametrize("scale", [1e-6, 1e6])
    @pytest.mark.parametrize("of", ["kernel", "inputs"])
    def test_scales_of_kernel_and_inputs_do_not_matter(self, scale, of):
        weight, moment = self.weight(self.dense), self.moment(self.dense)
        rank = self.ranks(self.dense)[1]
        usual = factorize(self.fitter, weight, self.dense, rank, [moment])
        if of == "kernel":
            scaled = factorize(self.fitter, scale * weight, self.dense, rank, [moment])
            assert distance(scaled.to_kernel(), scale * usual.to_kernel()) < 1e-6
        else:
            larger = SecondMoment(matrix=scale**2 * moment.matrix)
            scaled = factorize(self.fitter, weight, self.dense, rank, [larger])
            assert distance(scaled.to_kernel(), usual.to_kernel()) < 1e-3

    @pytest.mark.parametrize("dtype", list(HALF_TO_DOUBLE), ids=str)
    def test_fit_to_data_has_the_dtype_of_the_layer(self, dtype):
        weight, moments = self.weight(self.dense, dtype), [self.moment(self.dense)]
        rank = self.ranks(self.dense)[1]
        fitted = factorize(self.fitter, weight, self.dense, rank, moments)
        assert {w.dtype for w in tensors(fitted)} == {dtype}
        precise = factorize(self.fitter, weight.double(), self.dense, rank, moments)
        lost, least = (self.lost(f, weight, moments) for f in (fitted, precise))
        assert lost == pytest.approx(least, rel=30 * HALF_TO_DOUBLE[dtype])

    @pytest.mark.parametrize("zero", [False, True])
    def test_fit_of_a_kernel_of_rank_one_or_none_to_data(self, zero):
        weight = self.of_rank_one(lambda size: torch.linspace(-1, 2, size).double())
        weight = 0 * weight if zero else weight
        for kind in MOMENT_KINDS:
            moments = [self.moment(self.dense, kind)]
            for rank in self.ranks(self.dense):
                fitted = factorize(self.fitter, weight, self.dense, rank, moments)
                gone = (weight - fitted.to_kernel()).flatten(1)
                power = moments[0].lost(weight.flatten(1)) or 1.0
                assert moments[0].lost(gone) / power < 1e-9
                assert all(torch.isfinite(w).all() for w in tensors(fitted))

    # -- a chain back to its factors ------------------------------------------------------------

    def test_factors_come_back_from_their_stages(self):
        weight = self.weight(self.dense)
        for rank in self.ranks(self.dense):
            (factors,) = factorize(self.decomposer, weight, self.dense, rank).groups
            again = self.decomposer.factors_of(factors.stage_weights())
            assert type(again) is type(factors)
            assert torch.equal(again.to_kernel(), factors.to_kernel())
            assert all(
                torch.equal(a, b) for a, b in zip(tensors(again), tensors(factors), strict=True)
            )

    def test_factors_come_back_from_a_chain(self):
        for geometry in self.taken():
            with case(geometry):
                layer, spec = geometry.layer(), geometry.spec
                rank = self.ranks(spec)[0]
                factorization = factorize(self.decomposer, layer.weight, spec, rank)
                chain = assemble(layer, self.decomposer, rank, factorization)
                again = self.decomposer.factors_in(chain)
                assert (again.spec, len(again.groups)) == (spec, spec.groups)
                assert torch.equal(again.to_kernel(), factorization.to_kernel())

    def test_a_chain_becomes_the_layer_again(self):
        for geometry in self.taken():
            with case(geometry):
                layer, spec = geometry.layer(), geometry.spec
                rank = self.ranks(spec)[0]
                factorization = factorize(self.decomposer, layer.weight, spec, rank)
                chain = assemble(layer, self.decomposer, rank, factorization)
                again, x = chain.to_layer(), geometry.input(2)
                assert type(again) is type(layer)
                assert LayerSpec.of(again) == spec
                torch.testing.assert_close(again(x), chain(x))

    # -- estimates ------------------------------------------------------------------------------

    def test_losses_at_every_rank_are_those_of_the_fits(self):
        for kind in (None, *MOMENT_KINDS):
            for weighted in (False, True):
                with case(kind, weighted):
                    self.check_losses_at_every_rank(kind, weighted)

    def check_losses_at_every_rank(self, kind, weighted):
        weight = self.weight(self.dense)
        moment = None if kind is None else self.moment(self.dense, kind)
        out = self.dense.out_channels
        root = self.weight(LayerSpec(out, out), seed=7)
        importance = root @ root.T if weighted else None
        losses = self.fitter.lost_at_every_rank(weight, moment, importance)
        if losses is None:
            return
        weights = torch.eye(out).double() if importance is None else importance
        seen = torch.eye(self.dense.fan_in).double()
        if moment is not None:
            seen = moment.matrix if moment.matrix is not None else moment.rows.T @ moment.rows
        largest = self.fitter.max_rank(self.dense)
        assert losses.shape == (largest + 1,)
        for rank in range(largest + 1):
            gone = weight
            if rank:
                moments = None if moment is None else [moment]
                fitted = factorize(self.fitter, weight, self.dense, rank, moments)
                gone = weight - fitted.to_kernel()
            gone = gone.flatten(1)
            lost = (weights @ gone @ seen @ gone.T).trace().item()
            assert losses[rank].item() == pytest.approx(lost, rel=1e-6, abs=1e-8 * losses[0].item())

    def test_draft_is_nearly_as_good(self):
        weight, moments = self.weight(self.dense), [self.moment(self.dense)]
        for rank in self.ranks(self.dense):
            quick, best = (
                self.lost(
                    factorize(self.fitter, weight, self.dense, rank, moments, draft=draft),
                    weight,
                    moments,
                )
                for draft in (True, False)
            )
            assert quick <= 1.5 * best + 1e-2


class ExactMethodCase(DecomposerCase):
    """Methods that lose nothing at their largest useful rank."""

    @pytest.mark.parametrize("kind", MOMENT_KINDS)
    def test_full_rank_fit_to_data_equals_the_kernel(self, kind):
        weight, moment = self.weight(self.dense), self.moment(self.dense, kind)
        rank = self.fitter.max_rank(self.dense)
        fitted = factorize(self.fitter, weight, self.dense, rank, [moment])
        assert moment.lost((weight - fitted.to_kernel()).flatten(1)) < 1e-9 * moment.trace
        if kind == "full":
            assert distance(fitted.to_kernel(), weight) < 1e-5

    def test_full_rank_equals_the_layer(self, geometry):
        rank = self.decomposer.max_rank(geometry.spec)
        for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
            layer, x = geometry.layer(dtype), geometry.input(2, dtype=dtype)
            factorization = factorize(self.decomposer, layer.weight, geometry.spec, rank)
            chain = assemble(layer, self.decomposer, rank, factorization)
            with case(dtype), torch.no_grad():
                assert distance(factorization.to_kernel(), layer.weight) < bound
                assert distance(chain(x), layer(x)) < bound

    @pytest.mark.parametrize("dtype, bound", list(HALF_TO_DOUBLE.items()), ids=str)
    def test_full_rank_is_exact_in_every_dtype(self, dtype, bound):
        weight = self.weight(self.dense, dtype)
        rank = self.decomposer.max_rank(self.dense)
        kernel = factorize(self.decomposer, weight, self.dense, rank).to_kernel()
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
            kernel = factorize(self.decomposer, weight, spec, rank).to_kernel()
            errors.append((kernel - weight).norm().item())
            tail = math.sqrt((values[:, rank:] ** 2).sum())
            assert errors[-1] == pytest.approx(tail, rel=1e-9, abs=1e-9)
        assert all(b < a for a, b in itertools.pairwise(errors))

    def test_spectrum_is_that_of_the_matrix(self):
        for geometry in self.taken():
            with case(geometry):
                spec = geometry.spec
                (spectrum,) = spectra_of(self.decomposer, geometry.layer().weight, spec)
                values = self.group_singular_values(geometry)
                assert sorted(spectrum.shape)[0] == values.shape[1]
                assert math.prod(spectrum.shape) == math.prod(spec.weight_shape) // spec.groups
                scale = float(geometry.layer().weight.detach().abs().max())
                np.testing.assert_allclose(
                    spectrum.squares * scale**2, values**2, rtol=1e-9, atol=1e-9
                )

    def test_both_layers_share_the_norm(self):
        rank = self.ranks(self.dense)[1]
        first, second = factorize(
            self.decomposer, self.weight(self.dense), self.dense, rank
        ).stage_weights()
        assert first.norm().item() == pytest.approx(second.norm().item())


class PrincipalOutputsCase(MatrixMethodCase):
    """Methods whose fit to data has a closed form: the principal components of the outputs."""

    @pytest.mark.parametrize("kind", MOMENT_KINDS)
    @pytest.mark.parametrize("shift", [0.0, 3.0], ids=["centred", "shifted"])
    def test_fit_to_data_is_the_best_low_rank_approximation_of_the_outputs(self, kind, shift):
        weight = self.weight(self.dense)
        rows = self.rows(self.dense, kind)
        rows = rows + shift * rows.std()
        outputs = (rows @ weight.flatten(1).T).numpy()  # (samples, out)
        values = np.linalg.svd(outputs, compute_uv=False)
        whole = (values**2).sum()
        for moment in (SecondMoment(rows=rows), SecondMoment(matrix=rows.T @ rows)):
            for rank in range(1, self.decomposer.max_rank(self.dense) + 1):
                fitted = factorize(self.decomposer, weight, self.dense, rank, [moment])
                approximated = (rows @ fitted.to_kernel().flatten(1).T).numpy()
                lost = ((outputs - approximated) ** 2).sum()
                assert lost == pytest.approx((values[rank:] ** 2).sum(), rel=1e-6, abs=1e-9 * whole)

    def test_both_layers_share_the_norm_of_each_component(self):
        fitted = factorize(
            self.decomposer,
            self.weight(self.dense),
            self.dense,
            self.ranks(self.dense)[1],
            [self.moment(self.dense)],
        )
        first, second = fitted.stage_weights()
        norms = first.flatten(1).norm(dim=1)
        assert distance(second.flatten(1).norm(dim=0), norms) < 1e-10
