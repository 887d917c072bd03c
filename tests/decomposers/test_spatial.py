import pytest
from torch import nn

from tdecomp.decomposers.spatial import Spatial
from tdecomp.layers.spec import LayerSpec
from tests.decomposers.oracle import MatrixMethodCase
from tests.geometries import geometries


class TestSpatial(MatrixMethodCase):
    decomposer = Spatial()
    drawn = geometries(ndims=(2,))
    dense = LayerSpec.of(nn.Conv2d(4, 5, (3, 2)))

    def takes(self, spec):
        return spec.ndim == 2

    def matrix(self, kernel):
        out, into, height, width = kernel.shape
        return kernel.transpose(1, 2, 0, 3).reshape(into * height, out * width)

    @pytest.mark.parametrize(
        "layer, rank",
        [
            (nn.Conv2d(16, 32, 3), 48),
            (nn.Conv2d(16, 32, (5, 1)), 32),
            (nn.Conv2d(16, 32, (1, 5)), 16),
            (nn.Conv2d(16, 32, 3, groups=4), 12),
            (nn.ConvTranspose2d(8, 4, 2), 8),
        ],
    )
    def test_largest_useful_rank(self, layer, rank):
        assert Spatial().max_rank(LayerSpec.of(layer)) == rank

    def test_each_layer_has_one_dimension(self):
        first, second = Spatial().stages(
            LayerSpec.of(nn.Conv2d(4, 6, (3, 5), stride=(1, 2), padding=(1, 2), dilation=(2, 1))), 7
        )
        assert (first.kernel_size, second.kernel_size) == ((3, 1), (1, 5))
        assert (first.stride, second.stride) == ((1, 1), (1, 2))
        assert (first.padding, second.padding) == ((1, 0), (0, 2))
        assert (first.dilation, second.dilation) == ((2, 1), (1, 1))
