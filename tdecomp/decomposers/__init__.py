"""The methods. A new one is a file here, its test, and one line below."""

from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.cp import CP, CPSeparable
from tdecomp.decomposers.factors import Factors
from tdecomp.decomposers.lowrank import LowRank
from tdecomp.decomposers.registry import get_decomposer, register, registered
from tdecomp.decomposers.spatial import Spatial
from tdecomp.decomposers.svd import SVD
from tdecomp.decomposers.tucker2 import Tucker2

for _method in (SVD, LowRank, Spatial, Tucker2, CP, CPSeparable):
    register(_method)

__all__ = [
    "CP",
    "SVD",
    "CPSeparable",
    "Decomposer",
    "Factors",
    "LowRank",
    "Spatial",
    "Tucker2",
    "get_decomposer",
    "register",
    "registered",
]
