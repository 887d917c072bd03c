import pytest
from torch import nn

from tdecomp.decomposers.lowrank import LowRank
from tdecomp.layers.spec import LayerSpec
from tests.decomposers.oracle import PrincipalOutputsCase
from tests.decomposers.orthogonal import OrthogonalCase
from tests.geometries import geometries


class TestLowRank(PrincipalOutputsCase):
    decomposer = LowRank()
    drawn = geometries()
    dense = LayerSpec.of(nn.Conv2d(4, 10, (3, 2)))

    def takes(self, spec):
        return spec.ndim > 0

    def matrix(self, kernel):
        return kernel.reshape(len(kernel), -1)

    @pytest.mark.parametrize(
        "layer, rank",
        [
            (nn.Conv2d(16, 32, 3), 32),
            (nn.Conv2d(2, 32, (1, 3)), 6),
            (nn.Conv2d(16, 32, 3, groups=8), 4),
            (nn.ConvTranspose2d(2, 32, 2), 8),
            (nn.Conv1d(3, 64, 5), 15),
        ],
    )
    def test_largest_useful_rank(self, layer, rank):
        assert LowRank().max_rank(LayerSpec.of(layer)) == rank

    def test_wide_kernel_comes_first_for_transposed_layers_too(self):
        first, second = LowRank().stages(
            LayerSpec.of(nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1)), 5
        )
        assert (first.transposed, first.kernel_size, first.stride) == (True, (3, 3), (2, 2))
        assert (second.transposed, second.kernel_size, second.stride) == (False, (1, 1), (1, 1))


class TestOrthogonalLowRank(OrthogonalCase):
    decomposer = LowRank(orthogonal=True)
    oracle = TestLowRank()
    sample = (8, 6, 6)

    def network(self):
        return nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, groups=2), nn.ReLU())
