"""What holds for a method whose first factor is asked to have orthonormal rows."""

from typing import ClassVar

import pytest
import torch

import tdecomp
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.fit_layer import factorize
from tdecomp.linalg.second_moment import SecondMoment
from tests.decomposers.oracle import HALF_TO_DOUBLE, DecomposerCase, distance
from tests.geometries import case


def departure(first, groups):
    """The largest entry of F Fᵀ − I over the groups' rows of a first factor."""
    largest = 0.0
    for rows in first.detach().double().flatten(1).chunk(groups):
        gram = rows @ rows.T
        largest = max(largest, (gram - torch.eye(len(gram)).double()).abs().max().item())
    return largest


class OrthogonalCase:
    """Tests of a method with `orthogonal=True`, on the layers of the oracle of its defaults."""

    decomposer: ClassVar[Decomposer]
    oracle: ClassVar[DecomposerCase]
    sample: ClassVar[tuple[int, ...]]  # an input of `network`

    def network(self):
        """A network with one layer for the method, of several ranks."""
        raise NotImplementedError

    def test_second_layer_has_the_norm_in_orthogonal_columns_longest_first(self):
        oracle, spec = self.oracle, self.oracle.dense
        weight, rank = oracle.weight(spec), oracle.ranks(spec)[1]
        for moments in (None, [oracle.moment(spec)]):
            found = factorize(self.decomposer, weight, spec, rank, moments)
            first, second = found.stage_weights()
            assert departure(first, 1) < 1e-10
            gram = second.flatten(1).T @ second.flatten(1)
            squares = gram.diagonal()
            assert (gram - squares.diag()).abs().max() < 1e-10 * squares.max()
            assert (squares.diff() <= 1e-10 * squares.max()).all()

    def test_first_factor_is_orthonormal_and_the_product_is_that_of_the_plain_method(self):
        for geometry in self.oracle.taken():
            with case(geometry):
                spec, weight = geometry.spec, geometry.layer().weight
                some = torch.randn(spec.fan_in, spec.fan_in, generator=generator()).double()
                for given in (None, [SecondMoment(matrix=some @ some.T)] * spec.groups):
                    if given and spec.transposed:
                        continue
                    for rank in self.oracle.ranks(spec):
                        found, plain = (
                            factorize(method, weight, spec, rank, given)
                            for method in (self.decomposer, self.oracle.decomposer)
                        )
                        assert departure(found.stage_weights()[0], spec.groups) < 1e-10
                        assert distance(found.to_kernel(), plain.to_kernel()) < 1e-9

    @pytest.mark.parametrize("dtype", list(HALF_TO_DOUBLE), ids=str)
    @pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e4])
    def test_scale_and_rounding_leave_the_first_factor_orthonormal(self, dtype, scale):
        oracle, spec = self.oracle, self.oracle.dense
        weight = (scale * oracle.weight(spec)).to(dtype)
        for moments in (None, [oracle.moment(spec)]):
            for rank in oracle.ranks(spec):
                found = factorize(self.decomposer, weight, spec, rank, moments)
                assert departure(found.stage_weights()[0], 1) < HALF_TO_DOUBLE[dtype]

    def test_kernel_of_lower_rank_gets_orthonormal_rows_all_the_same(self):
        spec = self.oracle.dense
        weight = torch.ones(spec.weight_shape)
        for moments in (None, [self.oracle.moment(spec)]):
            found = factorize(self.decomposer, weight, spec, 3, moments)
            assert departure(found.stage_weights()[0], 1) < 1e-5
            assert distance(found.to_kernel(), weight) < 1e-5

    def test_option_is_kept_by_refitting_reducing_saving_and_loading(self, tmp_path):
        torch.manual_seed(0)
        model = self.network()
        batches = [torch.randn(64, *self.sample) for _ in range(3)]
        data = tdecomp.Data(batches, augment=None)
        quiet = {"data": data, "progress": False}
        result = tdecomp.decompose(
            model, self.decomposer, rank=4, recover="refit", example_inputs=batches[0], **quiet
        )
        (chain,) = chains_of(result.model)
        assert departure(chain[0].weight, chain.replaced.groups) < 1e-5
        with torch.no_grad():
            chain[0].weight.mul_(2)  # as a training may leave it
        reduced = tdecomp.reduce_ranks(result, rank=2, **quiet)
        (smaller,) = chains_of(reduced.model)
        assert (smaller.rank, smaller.decomposer) == (2, self.decomposer)
        assert departure(smaller[0].weight, chain.replaced.groups) < 1e-5
        reduced.save(tmp_path / "small.safetensors")
        loaded = tdecomp.load(tmp_path / "small.safetensors", model)
        assert chains_of(loaded)[0].decomposer == self.decomposer
        again = tdecomp.apply(
            model, tdecomp.Plan.from_json(result.plan.to_json()), progress=False
        ).model
        assert departure(chains_of(again)[0][0].weight, chain.replaced.groups) < 1e-5
        trained = tdecomp.reconstruct(result.model, model, data, progress=False)
        assert trained.error_after <= trained.error_before

    def test_other_values_are_refused(self):
        with pytest.raises(TypeError, match="expected orthogonal to be True or False, got 1"):
            type(self.decomposer)(orthogonal=1)
        assert repr(self.decomposer) == f"{type(self.decomposer).__name__}(orthogonal=True)"


def generator():
    return torch.Generator().manual_seed(4)


def chains_of(model):
    return [module for module in model.modules() if isinstance(module, tdecomp.Chain)]
