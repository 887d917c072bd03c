import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tdecomp.decomposers.als import ALS, component_norms
from tdecomp.decomposers.cp import CP, CPSeparable
from tdecomp.decomposers.factors import Factorization, better
from tdecomp.decomposers.fit_layer import factorize, spectra_of
from tdecomp.layers.spec import LayerSpec
from tdecomp.linalg.second_moment import SecondMoment
from tests.decomposers.oracle import MOMENT_KINDS, DecomposerCase, distance
from tests.geometries import geometries


def kernel_without_a_best_fit():
    """The kernel a⊗a⊗b + a⊗b⊗a + b⊗a⊗a, of rank 3, and a little noise.

    Approximations of rank 2 come as close to its first part as one likes, with components that grow
    without bound (de Silva and Lim 2008); the noise keeps it from counting as one of rank 2, which
    round-off may decide.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 4, generator=generator).double()
    kernel = sum(
        torch.einsum("i,j,k->ijk", *[b[m] if m == mode else a[m] for m in range(3)])
        for mode in range(3)
    )
    noise = torch.randn(4, 4, 4, generator=generator).double()
    return kernel + 0.03 * noise * kernel.norm() / noise.norm()


class TestDegenerateFits:
    def fitted(self, l2_reg=1e-4, **options):
        als = ALS(100, 1e-4, l2_reg, 0, "balanced", **options)
        return als.fit(kernel_without_a_best_fit(), 2)

    def norms(self, factors):
        return component_norms(factors) / float(kernel_without_a_best_fit().norm())

    def test_fit_is_made_again_with_ten_times_the_ridge(self):
        held = self.norms(self.fitted())
        bound = 0.95 * held / 2**0.5
        again = self.fitted(max_component_norms=bound)
        assert self.norms(again) < 0.95 * held
        kernel = kernel_without_a_best_fit()
        assert distance(torch.einsum("ir,jr,kr->ijk", *again), kernel) < 0.1
        expected = self.fitted(l2_reg=1e-3, max_component_norms=bound)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))

    def test_without_a_ridge_it_is_refused_at_once(self):
        bound = 0.95 * self.norms(self.fitted(l2_reg=0.0)) / 2**0.5
        with pytest.raises(ValueError, match="CP degenerates"):
            self.fitted(l2_reg=0.0, max_component_norms=bound)

    def test_it_is_refused_where_no_ridge_is_enough(self):
        with pytest.raises(ValueError, match=r"CP degenerates.*expected at most 0\.0141"):
            self.fitted(max_component_norms=0.01)

    def test_a_degenerate_start_is_left_for_another(self):
        start = self.fitted(l2_reg=0.0)
        once = ALS(1, 0.0, 1e-4, 0, "balanced")
        bound = 0.95 * self.norms(once.fit(kernel_without_a_best_fit(), 2, start)) / 2**0.5
        als = replace(once, n_iter_max=100, max_component_norms=bound)
        found = als.fit(kernel_without_a_best_fit(), 2, start)
        assert self.norms(found) <= bound * 2**0.5


def test_a_draft_is_an_argument_not_a_number_of_iterations():
    """As many sweeps, but only the last ones of a fit that is no draft go without the ridge."""
    kernel = LayerSpec.of(nn.Conv1d(6, 8, 4))
    weight = torch.randn(kernel.weight_shape, generator=torch.Generator().manual_seed(0)).double()
    method = CP(n_iter_max=8)
    plain, draft = (factorize(method, weight, kernel, 3, draft=d) for d in (False, True))
    assert distance(plain.to_kernel(), weight) < distance(draft.to_kernel(), weight)


class CPCase(DecomposerCase):
    drawn = geometries()
    dense = LayerSpec.of(nn.Conv2d(5, 6, (3, 2)))
    least_error = 1e-8  # alternating least squares with a ridge

    @property
    def fitter(self):
        return type(self.decomposer)(n_iter_max=30)

    def takes(self, spec):
        return spec.ndim > 0

    def ranks(self, spec):
        largest = self.decomposer.max_rank(spec)
        return sorted({1, min(3, largest), min(12, largest)})

    def test_components_are_balanced(self):
        for rank in self.ranks(self.dense):
            fitted = factorize(self.decomposer, self.weight(self.dense), self.dense, rank)
            (factors,) = fitted.groups
            norms = torch.stack([factor.norm(dim=0) for factor in factors.factors])  # (modes, R)
            assert distance(norms, norms.mean(dim=0).expand_as(norms)) < 1e-10

    @pytest.mark.parametrize("kind", MOMENT_KINDS)
    def test_components_of_a_fit_to_data_are_balanced(self, kind):
        for rank in self.ranks(self.dense):
            moments = [self.moment(self.dense, kind)]
            (factors,) = factorize(
                self.fitter, self.weight(self.dense), self.dense, rank, moments
            ).groups
            norms = torch.stack([factor.norm(dim=0) for factor in factors.factors])  # (modes, R)
            assert distance(norms, norms.mean(dim=0).expand_as(norms)) < 1e-10

    def test_start_is_kept_where_it_is_better_and_comes_out_balanced(self):
        weight = self.weight(self.dense)
        (factors,) = factorize(self.fitter, weight, self.dense, 3).groups
        first, second, *others = factors.factors
        lopsided = replace(factors, factors=(100 * first, second / 100, *others))
        start = Factorization(self.dense, (lopsided,))
        # By this moment nothing can be fitted, so that no fit is better than its start.
        nothing = SecondMoment(torch.full((self.dense.fan_in,) * 2, torch.nan).double())
        (again,) = factorize(self.fitter, weight, self.dense, 3, [nothing], start).groups
        assert distance(again.to_kernel(), factors.to_kernel()) < 1e-10
        norms = torch.stack([factor.norm(dim=0) for factor in again.factors])  # (modes, R)
        assert distance(norms, norms.mean(dim=0).expand_as(norms)) < 1e-10

    @pytest.mark.parametrize("wrong", [2.0, float("nan")])
    def test_worse_factors_are_not_better(self, wrong):
        weight, moment = self.weight(self.dense), self.moment(self.dense)
        (factors,) = factorize(self.fitter, weight, self.dense, 3).groups
        worse = factors.scaled(wrong)
        assert better(weight, moment, worse, factors) is factors
        assert better(weight, moment, factors, worse) is (worse if wrong != wrong else factors)

    @pytest.mark.parametrize("kind", ["gaussian", "falling"])
    def test_quick_multiplies_less_and_loses_little(self, kind):
        spec = LayerSpec.of(nn.Conv2d(48, 40, 3))
        weight = self.weight(spec)
        if kind == "falling":
            u, _, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
            weight = ((u * torch.arange(1.0, 41.0) ** -0.5) @ vh).reshape_as(weight)
        errors, products = {}, {}
        for effort in ("balanced", "quick"):
            method = type(self.decomposer)(effort=effort)
            with FlopCounterMode(display=False) as counter:
                fitted = factorize(method, weight, spec, 16)
            errors[effort] = distance(fitted.to_kernel(), weight)
            products[effort] = counter.get_total_flops()
        assert errors["quick"] <= 1.03 * errors["balanced"]
        assert products["quick"] <= 0.7 * products["balanced"]

    @pytest.mark.parametrize("effort", ["slow", "", None, 1, ["quick"]])
    def test_unknown_effort(self, effort):
        with pytest.raises(ValueError, match="expected effort to be 'balanced' or 'quick', got"):
            replace(self.decomposer, effort=effort)

    def test_balancing_keeps_the_kernel(self):
        fitted = factorize(self.decomposer, self.weight(self.dense), self.dense, 3)
        (factors,) = fitted.groups
        gains = torch.tensor([1e-3, 1.0, 50.0], dtype=torch.float64)
        first, second, *others = factors.factors
        type_ = type(factors)
        lopsided = type_((first * gains, second / gains, *others), factors.kernel_size)
        balanced = lopsided.balanced()
        assert distance(balanced.to_kernel(), factors.to_kernel()) < 1e-12
        for one, other in zip(balanced.factors, factors.factors, strict=True):
            assert distance(one, other) < 1e-10

    def test_component_with_a_zero_factor_becomes_zero(self):
        fitted = factorize(self.decomposer, self.weight(self.dense), self.dense, 3)
        (factors,) = fitted.groups
        first, *others = factors.factors
        first = first * torch.tensor([0.0, 1.0, 1.0])
        dead = type(factors)((first, *others), factors.kernel_size)
        balanced = dead.balanced()
        assert not any(factor[:, 0].any() for factor in balanced.factors)
        assert distance(balanced.to_kernel(), dead.to_kernel()) < 1e-12

    def test_random_state_decides_the_fit_above_the_channel_counts(self):
        weight, rank = self.weight(self.dense), self.decomposer.max_rank(self.dense)

        def kernel(random_state):
            method = type(self.decomposer)(n_iter_max=5, random_state=random_state)
            return factorize(method, weight, self.dense, rank).to_kernel()

        assert torch.equal(kernel(1), kernel(1))
        assert not torch.equal(kernel(1), kernel(2))

    def norms_without_a_best_fit(self, **options):
        """The component norms at rank 2, over the kernel's, and the error."""
        kernel = kernel_without_a_best_fit()
        method = type(self.decomposer)(**options)
        fitted = factorize(method, kernel, LayerSpec.of(nn.Conv1d(4, 4, 4)), 2)
        norms = torch.stack([factor.norm(dim=0) for factor in fitted.groups[0].factors])
        ratio = norms.prod(dim=0).sum() / kernel.norm()
        return ratio.item(), distance(fitted.to_kernel(), kernel)

    def test_ridge_holds_components_down_at_little_cost(self):
        free, least = self.norms_without_a_best_fit(l2_reg=0.0)
        held, error = self.norms_without_a_best_fit()
        assert held < 0.9 * free
        assert least < error < 0.03

    def test_float32_is_fitted_in_float64(self):
        weight = self.weight(self.dense, torch.float32)
        for rank in self.ranks(self.dense):
            single = factorize(self.decomposer, weight, self.dense, rank)
            double = factorize(self.decomposer, weight.double(), self.dense, rank)
            pairs = zip(single.stage_weights(), double.stage_weights(), strict=True)
            assert all(torch.equal(one, other.float()) for one, other in pairs)

    def test_has_no_spectrum(self):
        assert spectra_of(self.decomposer, self.weight(self.dense), self.dense) is None

    def test_high_rank_is_nearly_exact(self):
        method = type(self.decomposer)()
        weight = self.weight(self.dense)
        kernel = factorize(method, weight, self.dense, method.max_rank(self.dense)).to_kernel()
        assert distance(kernel, weight) < 2e-2

    def recovered(self, layer, rank, seeds=10):
        """In how many of `seeds` a kernel planted from Gaussian factors is fitted to 1e-3."""
        spec, method = LayerSpec.of(layer), type(self.decomposer)()
        modes = (spec.group_out, spec.group_in, *self.spatial_modes(spec.kernel_size))
        hits = 0
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            factors = [torch.randn(n, rank, generator=generator).double() for n in modes]
            letters = "abcde"[: len(modes)]
            equation = ",".join(f"{letter}r" for letter in letters) + f"->{letters}"
            kernel = torch.einsum(equation, *factors).reshape(
                spec.out_channels, spec.in_channels, *spec.kernel_size
            )
            weight = spec.from_forward_layout(kernel)
            hits += distance(factorize(method, weight, spec, rank).to_kernel(), weight) < 1e-3
        return hits

    @pytest.mark.parametrize("portion", [0.25, 0.5])
    @pytest.mark.parametrize(
        "layer",
        [
            nn.Conv2d(8, 8, 3),
            nn.Conv2d(16, 16, 3),
            nn.Conv2d(24, 12, (3, 5)),
            nn.Conv2d(10, 20, (2, 2)),
            nn.ConvTranspose2d(12, 8, 3),
            nn.Conv3d(8, 10, (2, 3, 2)),
        ],
        ids=str,
    )
    def test_planted_kernel_is_recovered(self, layer, portion):
        rank = int(portion * min(layer.in_channels, layer.out_channels))
        assert self.recovered(layer, rank) >= 9


class TestCP(CPCase):
    # Few sweeps: how well the kernel is fitted does not matter to what the chain computes.
    decomposer = CP(n_iter_max=3)

    def spatial_modes(self, kernel_size):
        return (math.prod(kernel_size),)

    @pytest.mark.parametrize(
        "layer, rank",
        [
            (nn.Conv2d(16, 32, 3), 16 * 9),
            (nn.Conv2d(2, 4, 3), 2 * 4),
            (nn.Conv2d(16, 32, 3, groups=8), 2 * 4),
            (nn.ConvTranspose1d(8, 4, 3), 3 * 4),
            (nn.Conv3d(20, 30, 2), 20 * 8),
        ],
    )
    def test_largest_useful_rank(self, layer, rank):
        assert CP().max_rank(LayerSpec.of(layer)) == rank

    def test_chain_has_three_layers(self):
        stages = CP().stages(LayerSpec.of(nn.Conv2d(4, 6, (3, 5), stride=2, padding=1)), 7)
        assert [s.kernel_size for s in stages] == [(1, 1), (3, 5), (1, 1)]
        assert [s.groups for s in stages] == [1, 7, 1]
        assert [s.stride for s in stages] == [(1, 1), (2, 2), (1, 1)]


class TestCPSeparable(CPCase):
    decomposer = CPSeparable(n_iter_max=3)

    def spatial_modes(self, kernel_size):
        return kernel_size

    @pytest.mark.parametrize(
        "layer, rank",
        [
            (nn.Conv2d(16, 32, 3), 16 * 9),
            (nn.Conv2d(2, 4, 3), 2 * 3 * 3),
            (nn.Conv2d(16, 32, 3, groups=8), 2 * 3 * 3),
            (nn.ConvTranspose1d(8, 4, 3), 3 * 4),
            (nn.Conv3d(20, 30, 2), 20 * 8),
        ],
    )
    def test_largest_useful_rank(self, layer, rank):
        assert CPSeparable().max_rank(LayerSpec.of(layer)) == rank

    @pytest.mark.parametrize("ndim", [1, 2, 3])
    def test_chain_has_one_layer_per_dimension(self, ndim):
        kernel = (2, 3, 4)[:ndim]
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 1](4, 6, kernel)
        first, *depthwise, last = CPSeparable().stages(LayerSpec.of(layer), 7)
        assert math.prod(first.kernel_size) == math.prod(last.kernel_size) == 1
        for d, stage in enumerate(depthwise):
            assert stage.kernel_size == tuple(kernel[d] if i == d else 1 for i in range(ndim))
            assert stage.groups == 7
        assert len(depthwise) == ndim
