"""tdecomp: decompose the layers of a trained PyTorch model.

>>> import tdecomp
>>> from torch import nn
>>> result = tdecomp.decompose(nn.Linear(64, 64), "svd", rank=8, progress=False)
>>> result.report[""].params_after
1088
"""

from tdecomp._distribution import VERSION as _VERSION  # first: refuses a mixed installation
from tdecomp.afterwards.batchnorm_folds import BatchnormFold, batchnorm_folds
from tdecomp.afterwards.fuse_batchnorm import fuse_batchnorm
from tdecomp.afterwards.recompose import recompose
from tdecomp.afterwards.reduce import reduce_ranks
from tdecomp.afterwards.stage_names import stage_names
from tdecomp.api import apply, decompose, plan, sensitivity
from tdecomp.calibration.augment import flip_and_shift
from tdecomp.calibration.calibrate import calibrate
from tdecomp.calibration.data import Data
from tdecomp.calibration.moments import Moments
from tdecomp.checkpoint.load import load
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.cp import CP, CPSeparable
from tdecomp.decomposers.factors import Factors
from tdecomp.decomposers.lowrank import LowRank
from tdecomp.decomposers.registry import register, registered
from tdecomp.decomposers.spatial import Spatial
from tdecomp.decomposers.split_svd import SplitSVD
from tdecomp.decomposers.svd import SVD
from tdecomp.decomposers.tt import TT
from tdecomp.decomposers.tucker2 import Tucker2
from tdecomp.layers.chain import Chain
from tdecomp.layers.cost import Cost
from tdecomp.layers.kinds import register_layer_kind
from tdecomp.layers.spec import LayerKind, LayerSpec
from tdecomp.linalg.second_moment import SecondMoment
from tdecomp.loss_curves.curve import LossCurve
from tdecomp.loss_curves.sensitivity import Sensitivity
from tdecomp.model.filters import at_least
from tdecomp.pictures.chain import draw
from tdecomp.pictures.drawing import Drawing
from tdecomp.plans.plan import Plan
from tdecomp.plans.report import Report
from tdecomp.plans.row import Row
from tdecomp.quality.compress import compress_to
from tdecomp.quality.compression import Compression
from tdecomp.quality.quality import Quality
from tdecomp.ranks.base import Candidate, Choice, LocalSelector, RankSelector
from tdecomp.ranks.breakeven import BreakEven
from tdecomp.ranks.budget import Budget
from tdecomp.ranks.energy import Energy
from tdecomp.ranks.output_variance import OutputVariance
from tdecomp.ranks.ratio import Ratio
from tdecomp.ranks.vbmf import VBMF
from tdecomp.recovery.batchnorm import RecalibrateBatchnorm, recalibrate_batchnorm
from tdecomp.recovery.decay import factor_decay
from tdecomp.recovery.distill import Distill, distill
from tdecomp.recovery.reconstruct import Reconstruct, reconstruct
from tdecomp.recovery.recovery import Recovery, RecoveryStep
from tdecomp.recovery.refit import Refit, refit
from tdecomp.result import Decomposition
from tdecomp.streaming.stream import stream
from tdecomp.timing.measure import profile
from tdecomp.timing.profile import Profile

__version__ = _VERSION

__all__ = [
    "CP",
    "SVD",
    "TT",
    "VBMF",
    "BatchnormFold",
    "BreakEven",
    "Budget",
    "CPSeparable",
    "Candidate",
    "Chain",
    "Choice",
    "Compression",
    "Cost",
    "Data",
    "Decomposer",
    "Decomposition",
    "Distill",
    "Drawing",
    "Energy",
    "Factors",
    "LayerKind",
    "LayerSpec",
    "LocalSelector",
    "LossCurve",
    "LowRank",
    "Moments",
    "OutputVariance",
    "Plan",
    "Profile",
    "Quality",
    "RankSelector",
    "Ratio",
    "RecalibrateBatchnorm",
    "Reconstruct",
    "Recovery",
    "RecoveryStep",
    "Refit",
    "Report",
    "Row",
    "SecondMoment",
    "Sensitivity",
    "Spatial",
    "SplitSVD",
    "Tucker2",
    "apply",
    "at_least",
    "batchnorm_folds",
    "calibrate",
    "compress_to",
    "decompose",
    "distill",
    "draw",
    "factor_decay",
    "flip_and_shift",
    "fuse_batchnorm",
    "load",
    "plan",
    "profile",
    "recalibrate_batchnorm",
    "recompose",
    "reconstruct",
    "reduce_ranks",
    "refit",
    "register",
    "register_layer_kind",
    "registered",
    "sensitivity",
    "stage_names",
    "stream",
]
