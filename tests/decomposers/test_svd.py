from torch import nn

from tdecomp.decomposers.svd import SVD
from tdecomp.layers.spec import LayerSpec
from tests.decomposers.oracle import PrincipalOutputsCase
from tests.decomposers.orthogonal import OrthogonalCase
from tests.geometries import geometries


class TestSVD(PrincipalOutputsCase):
    decomposer = SVD()
    drawn = geometries(ndims=(0, 1, 2, 3), largest_kernel=1)
    dense = LayerSpec.of(nn.Conv2d(10, 8, 1))

    def takes(self, spec):
        return spec.kernel_volume == 1

    def matrix(self, kernel):
        return kernel.reshape(len(kernel), -1)

    def test_largest_useful_rank(self):
        assert SVD().max_rank(LayerSpec(300, 20)) == 20
        assert SVD().max_rank(LayerSpec(20, 300)) == 20

    def test_stages_of_a_linear_layer(self):
        first, second = SVD().stages(LayerSpec(10, 8), 3)
        assert (first, second) == (LayerSpec(10, 3, bias=False), LayerSpec(3, 8))


class TestOrthogonalSVD(OrthogonalCase):
    decomposer = SVD(orthogonal=True)
    oracle = TestSVD()
    sample = (16,)

    def network(self):
        return nn.Sequential(nn.Linear(16, 12), nn.ReLU())
