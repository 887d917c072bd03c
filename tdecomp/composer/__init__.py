"""The surface of MosaicML Composer's Factorize, solved in closed form; nothing here imports it.

Differences from Composer, on purpose: the factors are the optimum at once, whatever ``n_iters``
is; ``nmse`` is that of the returned factors and bias; strides and dilations work; a layer without a
bias gets none; replaced layers keep what they have learned.
"""

from tdecomp.composer.apply import apply_factorization
from tdecomp.composer.core import LowRankSolution, factorize_conv2d, factorize_matrix
from tdecomp.composer.modules import FactorizedConv2d, FactorizedLinear, factorizing_could_speedup

__all__ = [
    "FactorizedConv2d",
    "FactorizedLinear",
    "LowRankSolution",
    "apply_factorization",
    "factorize_conv2d",
    "factorize_matrix",
    "factorizing_could_speedup",
]
