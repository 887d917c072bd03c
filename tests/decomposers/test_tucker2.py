import numpy as np
import pytest
import tensorly
import torch
from tensorly.decomposition import partial_tucker
from torch import nn

from tdecomp.decomposers.fit_layer import factorize, spectra_of
from tdecomp.decomposers.tucker2 import Tucker2
from tdecomp.layers.spec import LayerSpec
from tests.decomposers.oracle import ExactMethodCase, distance, middle
from tests.geometries import geometries


class TestTucker2(ExactMethodCase):
    decomposer = Tucker2()
    drawn = geometries()
    dense = LayerSpec.of(nn.Conv2d(5, 8, (3, 2)))

    def takes(self, spec):
        return spec.ndim > 0

    def ranks(self, spec):
        into, out = self.decomposer.max_rank(spec)
        return sorted({(1, 1), (1, out), (middle(into), middle(out)), (into, out)})

    def wrong_ranks(self, largest):
        into, out = largest
        wrong = [(0, 1), (1, -1), (into, out + 1), (into + 1, out), (0, 0)]
        return [*wrong, 1, (1,), (1, 1, 1), (), (1.0, 1), (True, 1)]

    @pytest.mark.parametrize(
        "layer, ranks",
        [
            (nn.Conv2d(16, 32, 3), (16, 32)),
            (nn.Conv2d(2, 32, 3), (2, 18)),
            (nn.Conv2d(32, 2, 3), (18, 2)),
            (nn.Conv2d(16, 32, 3, groups=8), (2, 4)),
            (nn.ConvTranspose1d(32, 3, 2), (6, 3)),
        ],
    )
    def test_largest_useful_ranks_in_chain_order(self, layer, ranks):
        assert Tucker2().max_rank(LayerSpec.of(layer)) == ranks

    @pytest.mark.parametrize(
        "spec", [dense, LayerSpec.of(nn.Conv1d(6, 5, 3)), LayerSpec.of(nn.ConvTranspose2d(5, 4, 2))]
    )
    def test_error_hardly_rises_with_either_rank(self, spec):
        weight = self.weight(spec)
        into, out = self.decomposer.max_rank(spec)
        errors = np.array(
            [
                [
                    distance(factorize(Tucker2(), weight, spec, (r, s)).to_kernel(), weight)
                    for s in range(1, out + 1)
                ]
                for r in range(1, into + 1)
            ]
        )
        assert np.diff(errors, axis=0).max() < 1e-4
        assert np.diff(errors, axis=1).max() < 1e-4
        assert errors[0, 0] > 0.5 > 1e-10 > errors[-1, -1]

    @pytest.mark.parametrize("ranks", [(1, 10), (10, 1), (1, 9), (12, 1)])
    def test_rank_above_what_the_other_one_leaves(self, ranks):
        spec = LayerSpec.of(nn.Conv2d(12, 12, 3))
        weight = self.weight(spec)
        factorization = factorize(Tucker2(), weight, spec, ranks)
        shapes = [tuple(w.shape) for w in factorization.stage_weights()]
        into, out = ranks
        assert shapes == [(into, 12, 1, 1), (out, into, 3, 3), (12, out, 1, 1)]
        most = tuple(min(rank, 9) for rank in ranks)
        enough = factorize(Tucker2(), weight, spec, most)
        assert distance(factorization.to_kernel(), weight) <= (
            distance(enough.to_kernel(), weight) + 1e-4
        )

    def test_spectra_are_those_of_the_channel_unfoldings_in_chain_order(self):
        spec = LayerSpec.of(nn.Conv2d(4, 7, 2))
        weight = self.weight(spec)
        into, out = spectra_of(Tucker2(), weight, spec)
        for spectrum, mode in ((into, 1), (out, 0)):
            matrix = np.moveaxis(weight.numpy(), mode, 0).reshape(weight.shape[mode], -1)
            assert spectrum.shape == matrix.shape
            values = np.linalg.svd(matrix, compute_uv=False)
            scale = np.abs(matrix).max()
            np.testing.assert_allclose(spectrum.squares * scale**2, values[None] ** 2, rtol=1e-9)

    @pytest.mark.parametrize("ranks", [(1, 2), (1, 4), (3, 2), (3, 4)])
    def test_planted_ranks_are_found(self, ranks):
        spec = LayerSpec.of(nn.Conv2d(8, 9, 3))
        into, out = ranks
        core = self.weight(LayerSpec.of(nn.Conv2d(into, out, 3)))
        left, right = (
            self.weight(LayerSpec(out, 9), seed=1),
            self.weight(LayerSpec(into, 8), seed=2),
        )
        weight = (left @ core.flatten(1)).reshape(9, into, 3, 3)
        weight = (right @ weight.transpose(0, 1).flatten(1)).reshape(8, 9, 3, 3).transpose(0, 1)
        kernel = factorize(Tucker2(), weight, spec, ranks).to_kernel()
        assert distance(kernel, weight) < 1e-10

    @pytest.mark.parametrize("ranks", [(4, 6), (10, 3), (15, 20)])
    @pytest.mark.parametrize("falling", [0.0, 0.5, 2.0])
    def test_as_good_as_partial_tucker(self, ranks, falling):
        spec = LayerSpec.of(nn.Conv2d(16, 24, 3))
        weight = self.weight(spec)
        weight = weight * torch.arange(1.0, 17.0).reshape(1, 16, 1, 1) ** -falling
        into, out = ranks
        with tensorly.backend_context("pytorch"):
            (core, factors), _ = partial_tucker(weight, [out, into], modes=[0, 1], init="svd")
            plain = tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
        ours = factorize(Tucker2(), weight, spec, ranks).to_kernel()
        assert distance(ours, weight) <= 1.001 * distance(plain, weight)

    def test_a_start_that_is_as_good_as_any_is_not_swept(self):
        swept, unswept = Tucker2(tol=1e-12), Tucker2(tol=10.0)
        weight = self.weight(LayerSpec.of(nn.Conv2d(12, 10, 1)))  # both unfoldings are one matrix
        start, fitted = (method.fit(weight, (4, 4)) for method in (unswept, swept))
        assert torch.equal(fitted.to_kernel(), start.to_kernel())
        squares = torch.linalg.svdvals(weight.flatten(1)) ** 2
        best = (squares[4:].sum() / squares.sum()).sqrt().item()
        assert distance(fitted.to_kernel(), weight) == pytest.approx(best, rel=1e-10)
        weight = self.weight(LayerSpec.of(nn.Conv2d(12, 10, 3)))  # any other start is
        start, fitted = (method.fit(weight, (4, 4)) for method in (unswept, swept))
        assert distance(fitted.to_kernel(), weight) < distance(start.to_kernel(), weight)

    def test_one_sweep_more_loses_no_more(self):
        spec = LayerSpec.of(nn.Conv2d(16, 24, 3))
        weight = self.weight(spec)
        errors = [
            distance(factorize(Tucker2(n, tol=0.0), weight, spec, (5, 7)).to_kernel(), weight)
            for n in (1, 2, 4, 8, 50)
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[0] > errors[2] > errors[-1]
