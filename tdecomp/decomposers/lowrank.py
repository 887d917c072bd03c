"""Low rank over the whole kernel: K×K with few outputs, then 1×1.

Zhang et al. 2016, "Accelerating Very Deep Convolutional Networks for Classification and
Detection", section 3.1; the structure of MosaicML Composer's Factorize.
"""

from dataclasses import dataclass

from tdecomp.decomposers.svd import SVD
from tdecomp.layers.spec import LayerSpec


@dataclass(frozen=True)
class LowRank(SVD):
    """A convolution S→T becomes K×K S→rank without bias and 1×1 rank→T with it.

    >>> print(*LowRank().stages(LayerSpec.of(nn.Conv2d(16, 32, 3, padding=1)), 8))
    Conv2d(16→8, 3×3, padding=1, no bias) Conv2d(8→32, 1×1)

    The same optimum as `SVD`, of the kernel as a matrix (T, S · K · K), on any convolution.

    Zhang et al. 2016, "Accelerating Very Deep Convolutional Networks for Classification and
    Detection": the chain in section 3.1, the fit to data in equations 4 to 6.

    Its parameter is that of `SVD`: with `orthogonal=True` the rows of the first layer's kernel as a
    matrix (rank, S · K · K) are orthonormal.
    """

    name = "lowrank"
    source = "Zhang et al. 2016"

    def refusal(self, spec: LayerSpec) -> str | None:
        return None if spec.ndim else "lowrank takes convolutions; svd takes Linear layers"

    def contained_in(self, spec: LayerSpec) -> tuple[str, ...]:
        return ("svd",) if spec.kernel_volume == 1 else ()
