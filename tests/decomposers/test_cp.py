import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tdecomp.decomposers import als, cp
from tdecomp.decomposers.cp import CP, CPSeparable
from tdecomp.decomposers.factors import Factorization
from tdecomp.decomposers.fit_layer import factorize, spectra_of
from tdecomp.layers.spec import LayerSpec
from tests.decomposers.oracle import MOMENT_KINDS, DecomposerCase, distance
from tests.geometries import geometries


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

    @pytest.mark.parametrize("wrong", [2.0, float("nan")])
    def test_start_is_kept_where_it_is_better_and_comes_out_balanced(self, wrong, monkeypatch):
        weight = self.weight(self.dense)
        (factors,) = factorize(self.fitter, weight, self.dense, 3).groups
        first, second, *others = factors.factors
        lopsided = replace(factors, factors=(100 * first, second / 100, *others))
        start = Factorization(self.dense, (lopsided,))
        monkeypatch.setattr(cp, "fit_cp_to", lambda _, start, *__: start.scaled(wrong))
        moment = self.moment(self.dense)
        (again,) = factorize(self.fitter, weight, self.dense, 3, [moment], start).groups
        assert distance(again.to_kernel(), factors.to_kernel()) < 1e-10
        norms = torch.stack([factor.norm(dim=0) for factor in again.factors])  # (modes, R)
        assert distance(norms, norms.mean(dim=0).expand_as(norms)) < 1e-10

    @pytest.mark.parametrize("kind", ["gaussian", "falling"])
    def test_quick_makes_fewer_sweeps_and_loses_little(self, kind, monkeypatch):
        spec = LayerSpec.of(nn.Conv2d(48, 40, 3))
        weight = self.weight(spec)
        if kind == "falling":
            u, _, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
            weight = ((u * torch.arange(1.0, 41.0) ** -0.5) @ vh).reshape_as(weight)
        original, errors, sweeps = als.parafac, {}, {}
        for effort in ("balanced", "quick"):
            made = []

            def count(*args, made=made, **options):
                found = original(*args, **options)
                made.append(len(found[1]))
                return found

            monkeypatch.setattr(als, "parafac", count)
            method = type(self.decomposer)(effort=effort)
            errors[effort] = distance(factorize(method, weight, spec, 16).to_kernel(), weight)
            sweeps[effort] = sum(made)
        assert errors["quick"] <= 1.03 * errors["balanced"]
        assert sweeps["quick"] <= 0.7 * sweeps["balanced"]

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
        """The component norms at rank 2, over the kernel's, and the error.

        The kernel a⊗a⊗b + a⊗b⊗a + b⊗a⊗a has rank 3, and approximations of rank 2 as good as one
        likes whose components grow without bound (de Silva and Lim 2008).
        """
        generator = torch.Generator().manual_seed(0)
        a, b = torch.randn(2, 3, 4, generator=generator).double()
        kernel = sum(
            torch.einsum("i,j,k->ijk", *[b[m] if m == mode else a[m] for m in range(3)])
            for mode in range(3)
        )
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

    def test_degenerate_fit_is_made_again_or_refused(self, monkeypatch):
        held, _ = self.norms_without_a_best_fit()
        bound = 0.95 * held
        monkeypatch.setattr(als, "_MAX_COMPONENT_NORMS", bound / 2**0.5)
        again, error = self.norms_without_a_best_fit()
        assert again < bound
        assert error < 0.1
        with pytest.raises(ValueError, match="CP degenerates"):
            self.norms_without_a_best_fit(l2_reg=0.0)
        monkeypatch.setattr(als, "_MAX_COMPONENT_NORMS", 0.01)
        with pytest.raises(ValueError, match="CP degenerates"):
            self.norms_without_a_best_fit()

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
        modes = (spec.group_out, spec.group_in, *method._spatial_modes(spec.kernel_size))
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
    # Few sweeps: what the chain does has nothing to do with how good the fit is.
    decomposer = CP(n_iter_max=3)

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
