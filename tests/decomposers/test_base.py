"""The registry, and what the contract promises beyond any one method."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.decomposers.assemble import assemble, empty_chain
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.factors import Factors
from tdecomp.decomposers.fit_layer import factorize, relative_error
from tdecomp.decomposers.lowrank import LowRank
from tdecomp.decomposers.registry import get_decomposer, register, registered, unregister
from tdecomp.decomposers.svd import SVD
from tdecomp.layers.spec import LayerSpec


@pytest.fixture(autouse=True)
def own_registry():
    """Methods that a test registers are forgotten after it, and those of the library come back."""
    before = {name: get_decomposer(name) for name in registered()}
    yield
    for name in set(registered()) - set(before):
        unregister(name)
    for method in before.values():
        register(method)


@dataclass(frozen=True)
class MeanFactors(Factors):
    rows: torch.Tensor  # (out, 1)
    columns: torch.Tensor  # (1, in)

    def to_kernel(self):
        return self.rows @ self.columns

    def stage_weights(self):
        return self.columns, self.rows

    def scaled(self, scale):
        return replace(self, rows=self.rows * scale)


class Mean(Decomposer):
    """A user's own: every row of a matrix becomes the mean of all rows."""

    name = "mean"
    source = "nobody"

    def refusal(self, spec):
        return "mean takes Linear layers" if spec.ndim else None

    def max_rank(self, spec):
        return min(1, spec.in_channels)

    def stages(self, spec, rank):
        return (
            LayerSpec(spec.in_channels, rank, bias=False),
            LayerSpec(rank, spec.out_channels, bias=spec.bias),
        )

    def fit(self, kernel, rank):
        return MeanFactors(kernel.new_ones(len(kernel), rank), kernel.mean(dim=0, keepdim=True))


METHODS = ("refusal", "max_rank", "stages", "fit")


class TestRegistry:
    def test_library_registers_its_own(self):
        own = ("svd", "lowrank", "spatial", "tucker2", "cp", "cp-separable", "split-svd", "tt")
        assert registered() == own
        for name in registered():
            assert get_decomposer(name).name == name
            assert get_decomposer(name).source

    def test_class(self):
        assert tdecomp.register(Mean) is Mean
        assert isinstance(get_decomposer("mean"), Mean)
        assert registered()[-1] == "mean"

    def test_decorator(self):
        @tdecomp.register
        class Decorated(Mean):
            name = "decorated"

        assert isinstance(get_decomposer("decorated"), Decorated)

    def test_instance_keeps_its_options(self):
        method = tdecomp.CP(n_iter_max=7)
        assert tdecomp.register(method) is method
        assert get_decomposer("cp") is method

    def test_decomposer_is_taken_as_it_is(self):
        method = Mean()
        assert get_decomposer(method) is method

    def test_name_of_another_decomposer_is_refused(self):
        class Impostor(Mean):
            name = "svd"

        with pytest.raises(ValueError, match="'svd' is the name of SVD already"):
            tdecomp.register(Impostor)
        assert isinstance(get_decomposer("svd"), SVD)

    @pytest.mark.parametrize("wrong", [nn.Linear(2, 2), dict, "svd", None], ids=str)
    def test_only_decomposers_are_registered(self, wrong):
        with pytest.raises(TypeError, match="expected a Decomposer"):
            tdecomp.register(wrong)

    @pytest.mark.parametrize("wrong", ["", None, 3])
    def test_name_is_needed(self, wrong):
        class Nameless(Mean):
            name = wrong

        with pytest.raises(ValueError, match="Nameless needs a name"):
            tdecomp.register(Nameless)

    def test_name_is_needed_at_all(self):
        bare = type("Bare", (Decomposer,), {k: getattr(Mean, k) for k in METHODS})
        with pytest.raises(ValueError, match="Bare needs a name"):
            tdecomp.register(bare)

    def test_unknown_name_lists_what_exists(self):
        with pytest.raises(ValueError, match="unknown method 'tucker3'") as error:
            get_decomposer("tucker3")
        for name in registered():
            assert repr(name) in str(error.value)
        assert "tdecomp.register" in str(error.value)

    @pytest.mark.parametrize("by_name", [True, False], ids=["by-name", "as-instance"])
    def test_a_users_own_works_in_decompose(self, by_name):
        tdecomp.register(Mean)
        model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 11))
        result = tdecomp.decompose(model, "mean" if by_name else Mean(), rank=1, progress=False)
        assert [row.method for row in result.report] == ["mean", "mean"]
        x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
        for index in (0, 2):
            expected = nn.functional.linear(
                x if index == 0 else x[:, :10],
                model[index].weight.mean(dim=0, keepdim=True).expand_as(model[index].weight),
                model[index].bias,
            )
            actual = result.model[index](x if index == 0 else x[:, :10])
            torch.testing.assert_close(actual, expected)


class TestChannelsLast:
    @pytest.mark.parametrize(
        "layer, memory_format",
        [
            (nn.Conv2d(4, 6, 3), torch.channels_last),
            (nn.Conv3d(4, 6, 2), torch.channels_last_3d),
            (nn.ConvTranspose2d(4, 6, 3), torch.channels_last),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("method", ["lowrank", "tucker2"])
    def test_is_kept(self, layer, memory_format, method):
        decomposer, spec = get_decomposer(method), LayerSpec.of(layer)
        rank = (2, 3) if method == "tucker2" else 3

        def chain():
            fitted = factorize(decomposer, layer.weight, spec, rank)
            return assemble(layer, decomposer, rank, fitted)

        usual = chain()
        assert all(stage.weight.is_contiguous() for stage in usual)
        layer.to(memory_format=memory_format)
        try:
            changed = chain()
        finally:
            layer.to(memory_format=torch.contiguous_format)
        for stage in changed:
            assert stage.weight.is_contiguous(memory_format=memory_format)
        assert not all(stage.weight.is_contiguous() for stage in changed)
        for one, other in zip(usual, changed, strict=True):
            torch.testing.assert_close(other.weight, one.weight)  # products may round otherwise


class TestBuild:
    def test_is_on_the_default_device_unless_told(self):
        spec = LayerSpec.of(nn.Conv2d(4, 6, 3))
        assert empty_chain(LowRank(), spec, 2)[0].weight.device == torch.get_default_device()
        assert empty_chain(LowRank(), spec, 2, torch.device("meta"))[0].weight.is_meta

    def test_linear_is_on_the_default_device_unless_told(self):
        assert empty_chain(SVD(), LayerSpec(4, 6), 2)[1].bias.device == torch.get_default_device()
        assert empty_chain(SVD(), LayerSpec(4, 6), 2, torch.device("meta"))[1].bias.is_meta

    def test_has_the_dtype_it_is_told(self):
        assert (
            empty_chain(SVD(), LayerSpec(4, 6), 2, dtype=torch.float16)[0].weight.dtype
            == torch.float16
        )


class TestRelativeError:
    def test_is_that_of_the_frobenius_norm(self):
        weight = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
        assert relative_error(weight, torch.zeros(2, 2)) == pytest.approx(1.0)
        assert relative_error(weight, torch.tensor([[0.0, 0.0], [0.0, 4.0]])) == pytest.approx(0.6)
        assert relative_error(weight, weight) == 0.0

    @pytest.mark.parametrize("scale", [1e-300, 1e300])
    def test_does_not_leave_the_range_of_float64(self, scale):
        weight = scale * torch.eye(3, dtype=torch.float64)
        assert relative_error(weight, weight / 2) == pytest.approx(0.5)

    def test_of_zero_is_zero_where_it_is_met(self):
        zero = torch.zeros(2, 2)
        assert relative_error(zero, zero) == 0.0
        assert relative_error(zero, zero + 1) > 0

    def test_of_nan_is_nan(self):
        assert relative_error(torch.ones(2), torch.tensor([1.0, torch.nan])) != pytest.approx(0)
