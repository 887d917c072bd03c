"""Tensor trains, against the oracle of all methods, TensorLy, and what theory says of them."""

import math
from itertools import permutations

import numpy as np
import pytest
import tensorly
import torch
from tensorly.decomposition import tensor_train_matrix
from tensorly.tt_matrix import tt_matrix_to_matrix
from torch import nn

import tdecomp
from tdecomp.decomposers.fit_layer import factorize, spectra_of
from tdecomp.decomposers.tt import TT, TTFactors, shapes_of
from tdecomp.layers.spec import LayerSpec
from tdecomp.layers.tensor_train import TTLinear
from tdecomp.linalg.second_moment import SecondMoment
from tdecomp.linalg.tensor_train import swept
from tests.decomposers.oracle import ExactMethodCase, distance, middle
from tests.geometries import Geometry, geometries

QUIET = {"progress": False}


class TensorTrainCase(ExactMethodCase):
    drawn = geometries(ndims=(0,)).filter(lambda g: TT().refusal(g.spec) is None)
    dense = LayerSpec(20, 12)
    stage_types = (TTLinear,)

    def takes(self, spec):
        return spec.ndim == 0 and (spec.in_channels, spec.out_channels) != (7, 5)

    def of_rank_one(self, values):
        """A Kronecker product of matrices of rank one."""
        weight = torch.ones(1, 1, dtype=torch.float64)
        for out, into in zip(*self.decomposer.shapes(self.dense), strict=True):
            weight = torch.kron(weight, values(out)[:, None] * values(into))
        return weight


class TestTwoCores(TensorTrainCase):
    decomposer = TT()

    def matrix(self, kernel):
        (out, _), (into, _) = self.decomposer._shapes(*kernel.shape)
        blocks = kernel.reshape(out, len(kernel) // out, into, -1).swapaxes(1, 2)
        return blocks.reshape(out * into, -1)

    def test_without_data_it_is_the_optimum_of_its_rank(self):
        weight = self.weight(self.dense)
        values = np.linalg.svd(self.matrix(weight.numpy()), compute_uv=False)
        for rank in range(1, self.decomposer.max_rank(self.dense) + 1):
            kernel = factorize(self.decomposer, weight, self.dense, rank).to_kernel()
            lost = (kernel - weight).norm().item()
            assert lost == pytest.approx(math.sqrt((values[rank:] ** 2).sum()), rel=1e-9, abs=1e-9)

    def test_both_cores_share_the_singular_values(self):
        weight = self.weight(self.dense)
        (first, second) = factorize(self.decomposer, weight, self.dense, 4).stage_weights()[0]
        values = np.linalg.svd(self.matrix(weight.numpy()), compute_uv=False)[:4]
        for gram in (first.flatten(0, 2).T @ first.flatten(0, 2), _outer(second.flatten(1))):
            np.testing.assert_allclose(gram.numpy(), np.diag(values), atol=1e-9)

    @pytest.mark.parametrize("kind", ["full", "copied"])
    def test_many_more_sweeps_gain_little_for_the_data(self, kind):
        weight, moment = self.weight(self.dense), self.moment(self.dense, kind)
        for rank in (1, 3, 8):
            fitted = TT().fit_to(weight, rank, moment)
            longer = TTFactors(tuple(swept(weight, fitted.cores, moment, 500)))
            lost, least = (moment.lost(weight - f.to_kernel()) for f in (fitted, longer))
            assert lost <= 1.1 * least + 1e-9 * moment.lost(weight)


def _outer(matrix):
    return matrix @ matrix.T


class TestThreeCores(TensorTrainCase):
    decomposer = TT(cores=3)
    drawn = geometries(ndims=(0,)).filter(lambda g: TT(cores=3).refusal(g.spec) is None)
    dense = LayerSpec(12, 18)

    def taken(self):
        sizes = ((8, 12), (12, 8), (30, 8), (27, 6))
        kinds = [Geometry(nn.Linear, size, options={"bias": b}) for size in sizes for b in (0, 1)]
        return [geometry for geometry in kinds if TT(cores=3).refusal(geometry.spec) is None]

    def ranks(self, spec):
        first, second = self.decomposer.max_rank(spec)
        middling = (middle(first), middle(second))
        return sorted({(1, 1), (1, second), middling, (first, second)})

    def wrong_ranks(self, largest):
        first, second = largest
        return [
            (0, 1),
            (1, -1),
            (first, second + 1),
            (first + 1, second),
            (0, 0),
            1,
            (1,),
            (),
            (1.0, 1),
        ]

    def test_refusal_says_which_layers_it_takes(self):
        assert "3 cores" in self.decomposer.refusal(LayerSpec(7, 5))
        assert "Linear" in self.decomposer.refusal(LayerSpec.of(nn.Conv2d(8, 8, 1)))
        assert len(self.taken()) > 4


# -- options, and the layers that they suit --------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"cores": 1}, "cores from 2 to 8, got 1"),
        ({"cores": 9}, "cores from 2 to 8, got 9"),
        ({"cores": True}, "got True"),
        ({"in_shape": (4, 4, 4)}, r"in_shape .* cores=2, got \(4, 4, 4\)"),
        ({"out_shape": (0, 4)}, "out_shape"),
        ({"out_shape": 16}, "out_shape .* got 16"),
        ({"in_shape": (2.0, 4)}, "in_shape"),
    ],
)
def test_options_are_checked_when_made(options, words):
    with pytest.raises(ValueError, match=words):
        TT(**options)


def test_shapes_that_are_not_the_layers_say_which_would_do():
    reason = TT(in_shape=(8, 8)).refusal(LayerSpec(128, 64))
    assert "in_shape=(8, 8) has the product 64, the layer has 128 inputs" in reason
    assert "(8, 16), (4, 32), (2, 64)" in reason
    assert "out_shape" in TT(out_shape=(3, 3)).refusal(LayerSpec(128, 64))
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64))
    plan = tdecomp.plan(model, TT(in_shape=(8, 8)), rank=2, **QUIET)
    assert [row.method for row in plan] == [None, "tt"]
    assert plan["0"].reason == reason
    with pytest.raises(ValueError, match=r"layer '0'.*could be \(8, 16\)"):
        plan.edit("0", method="tt", rank=2)


@pytest.mark.parametrize(
    "into, out, cores, in_shape, out_shape",
    [
        (512, 2048, 2, (16, 32), (64, 32)),
        (768, 768, 3, (8, 8, 12), (12, 8, 8)),
        (10, 7, 2, (2, 5), (7, 1)),
        (4096, 4096, 4, (8, 8, 8, 8), (8, 8, 8, 8)),
    ],
)
def test_default_shapes_are_nearly_equal_and_opposed(into, out, cores, in_shape, out_shape):
    method, spec = TT(cores=cores), LayerSpec(into, out)
    assert method.shapes(spec) == (out_shape, in_shape)
    # Of all orders of the outputs it is the one with the fewest weights.
    orders = [TT(in_shape, order, cores) for order in permutations(out_shape)]
    rank = 2 if cores == 2 else (2,) * (cores - 1)
    if cores == 2:
        params = [other.stages(spec, rank)[0].params for other in orders]
        assert method.stages(spec, rank)[0].params == min(params)


def test_a_given_shape_is_opposed_by_the_other_one():
    assert TT(in_shape=(32, 16)).shapes(LayerSpec(512, 24)) == ((4, 6), (32, 16))
    assert TT(out_shape=(4, 6)).shapes(LayerSpec(512, 24)) == ((4, 6), (32, 16))


def test_shapes_of_a_size_are_all_there_are():
    assert shapes_of(7, 3) == ((1, 1, 7),)
    for size, count in ((24, 2), (36, 3), (64, 4)):
        found = shapes_of(size, count)
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        grids = np.stack(np.meshgrid(*[divisors] * count)).reshape(count, -1)
        expected = {tuple(sorted(shape)) for shape in grids.T.tolist() if math.prod(shape) == size}
        assert set(found) == expected
        assert len(found) == len(expected)
        assert [sum(shape) for shape in found] == sorted(map(sum, found))


@pytest.mark.parametrize("into, out, cores", [(7, 5, 2), (13, 1, 2), (6, 1, 3), (7, 5, 3)])
def test_layers_without_enough_factors_are_left_alone(into, out, cores):
    assert "factors" in TT(cores=cores).refusal(LayerSpec(into, out))


def test_a_train_that_is_a_truncated_svd_is_left_to_svd():
    assert "svd" in TT(in_shape=(1, 12), out_shape=(8, 1)).refusal(LayerSpec(12, 8))
    assert "svd" in TT(in_shape=(12, 1), out_shape=(1, 8)).refusal(LayerSpec(12, 8))
    assert TT(in_shape=(1, 12), out_shape=(4, 2)).refusal(LayerSpec(12, 8)) is None


# -- the fit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [TT(), TT(cores=3)], ids=repr)
@pytest.mark.parametrize("data", [False, True])
def test_planted_ranks_are_found(method, data):
    spec = LayerSpec(24, 36)
    ranks = 3 if method.cores == 2 else (2, 3)
    (stage,) = method.stages(spec, ranks)
    module = stage.build(dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
        weight = method.factors_of((stage.read(module),)).to_kernel()
    moment = None
    if data:
        rows = torch.randn(300, 24, generator=torch.Generator().manual_seed(1)).double()
        moment = [SecondMoment(matrix=rows.T @ rows)]
    fitted = factorize(method, weight, spec, ranks, moment)
    assert distance(fitted.to_kernel(), weight) < 1e-9


def test_sweeps_are_no_worse_than_tensorlys_own_fit():
    method, spec, ranks = TT(cores=3), LayerSpec(36, 24), (3, 4)
    weight = torch.randn(24, 36, generator=torch.Generator().manual_seed(0)).double()
    out, into = method.shapes(spec)
    with tensorly.backend_context("pytorch"):
        plain = tensor_train_matrix(weight.reshape(*out, *into), [1, *ranks, 1])
        plain = tt_matrix_to_matrix(plain.factors)
    ours = method.fit(weight, ranks).to_kernel()
    assert distance(ours, weight) < 0.999 * distance(plain, weight)


def test_spectra_are_those_of_the_unfoldings():
    method, spec = TT(cores=3), LayerSpec(12, 18)
    weight = torch.randn(18, 12, generator=torch.Generator().manual_seed(0)).double()
    out, into = method.shapes(spec)
    joined = weight.numpy().reshape(*out, *into).transpose(0, 3, 1, 4, 2, 5)
    joined = joined.reshape([o * i for o, i in zip(out, into, strict=True)])
    for k, spectrum in enumerate(spectra_of(method, weight, spec), 1):
        matrix = joined.reshape(math.prod(joined.shape[:k]), -1)
        assert spectrum.shape == matrix.shape
        values = np.linalg.svd(matrix, compute_uv=False)
        scale = np.abs(weight.numpy()).max()
        np.testing.assert_allclose(spectrum.squares[0] * scale**2, values**2, atol=1e-9)
    # No fit loses less than any of the unfoldings, TT-SVD at most what all lose together.
    ranks = (3, 3)
    tails = [
        s.squares[0][r:].sum() / s.squares.sum()
        for s, r in zip(spectra_of(method, weight, spec), ranks, strict=True)
    ]
    lost = distance(factorize(method, weight, spec, ranks).to_kernel(), weight) ** 2
    assert max(tails) - 1e-9 <= lost <= sum(tails)


def test_losses_at_every_rank_are_known_for_two_cores_without_data_only():
    weight = torch.randn(18, 12, generator=torch.Generator().manual_seed(0)).double()
    moment = SecondMoment(matrix=torch.eye(12).double())
    assert TT().lost_at_every_rank(weight, None) is not None
    assert TT().lost_at_every_rank(weight, moment) is None
    assert TT(cores=3).lost_at_every_rank(weight, None) is None


def test_wide_layers_are_fitted_to_data_in_a_moment():
    spec = LayerSpec(1024, 512)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 1024, generator=generator)
    rows = torch.randn(2000, 1024, generator=generator) * torch.logspace(0.5, -0.5, 1024)
    moment = SecondMoment(matrix=(rows.T @ rows).double())
    plain, draft, fitted = (
        moment.lost(
            weight.double() - factorize(TT(), weight, spec, 6, seen, draft=d).to_kernel().double()
        )
        for seen, d in ((None, False), ([moment], True), ([moment], False))
    )
    assert fitted <= draft <= plain
