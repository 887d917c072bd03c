"""tdecomp: decompose the layers of a trained PyTorch model.

>>> import tdecomp
>>> from torch import nn
>>> result = tdecomp.decompose(nn.Linear(64, 64), "svd", rank=8, progress=False)
>>> result.report[""].params_after
1088
"""

from importlib.metadata import version as _version

from tdecomp.augment import flip_and_shift
from tdecomp.calibration import calibrate
from tdecomp.chain import Chain
from tdecomp.checkpoint import load
from tdecomp.decomposers import (
    CP,
    SVD,
    CPSeparable,
    Decomposer,
    Factors,
    LowRank,
    Spatial,
    Tucker2,
    register,
    registered,
)
from tdecomp.engine import Decomposition, apply, decompose
from tdecomp.latency import Profile, profile
from tdecomp.layer import LayerSpec
from tdecomp.moments import Moments
from tdecomp.planning import plan
from tdecomp.plans import Plan
from tdecomp.progressive import reduce_ranks
from tdecomp.ranks import VBMF, BreakEven, Budget, Energy, RankSelector, Ratio
from tdecomp.recovery import Recovery, distill, recalibrate_batchnorm, refit
from tdecomp.report import Report, Row

__version__ = _version("tdecomp")

__all__ = [
    "CP",
    "SVD",
    "VBMF",
    "BreakEven",
    "Budget",
    "CPSeparable",
    "Chain",
    "Decomposer",
    "Decomposition",
    "Energy",
    "Factors",
    "LayerSpec",
    "LowRank",
    "Moments",
    "Plan",
    "Profile",
    "RankSelector",
    "Ratio",
    "Recovery",
    "Report",
    "Row",
    "Spatial",
    "Tucker2",
    "apply",
    "calibrate",
    "decompose",
    "distill",
    "flip_and_shift",
    "load",
    "plan",
    "profile",
    "recalibrate_batchnorm",
    "reduce_ranks",
    "refit",
    "register",
    "registered",
]
