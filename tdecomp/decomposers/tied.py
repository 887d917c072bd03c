"""One factorization for layers that have one weight W (rows, columns) ≈ A (rows, R) · B.

A table looks a row of A up and multiplies it by B (R, columns); an output layer multiplies by Bᵀ,
then by Aᵀ. A is one parameter in all of their chains. B is stored transposed in an output layer's,
so that tables have one B, and output layers another; without data they start as the same.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from tdecomp.calibration.layer_moments import LayerMoments
from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.factors import Factorization
from tdecomp.layers.chain import Chain, Rank
from tdecomp.layers.cost import Cost, chain_cost
from tdecomp.layers.geometry import Call
from tdecomp.layers.lookup_chain import HeadChain
from tdecomp.layers.spec import LayerSpec

Member = tuple[LayerSpec, tuple[Call, ...] | None]  # a layer, and its calls if they are known


def factors_as(
    factors: Factorization,
    weight: Tensor,
    spec: LayerSpec,
    method: Decomposer,
    moments: LayerMoments | None,
) -> Factorization:
    """The factors of one layer as those of another that has its weight, with the same A.

    Of a table beside an output layer, B is the best one for this A: least squares over its rows, by
    how often they are read where that is known.
    """
    if spec.lookup == factors.spec.lookup:
        return replace(factors, spec=spec)
    large = factors.stage_weights()[-1]  # (rows, R)
    table = spec.to_forward_layout(weight.detach()).T.double()  # (rows, columns)
    weighted = large.double()
    if moments is not None:
        second = moments.shrunk(moments.second_moments())[0]
        weighted = second.applied(weighted.T).T
    normal = weighted.T @ large.double()
    small = torch.linalg.pinv(normal, hermitian=True) @ (weighted.T @ table)  # (R, columns)
    found = method.factors_of((large.T, small.T.to(large.dtype)))
    assert found is not None  # a method that takes lookups can tell
    return Factorization(spec, (found,))


def tied_chains(chains: Sequence[Chain]) -> list[Chain]:
    """The chains of layers that have one weight, sharing its factors."""
    first: dict[bool, Chain] = {}
    tied: list[Chain] = []
    for chain in chains:
        spec = chain.replaced
        assert spec is not None
        assert chain.rank is not None
        if not spec.lookup:
            made = HeadChain.from_stages([*chain], chain.decomposer, chain.rank, spec)
            chain = made.train(chain.training)
        like = first.setdefault(spec.lookup, chain)
        for mine, its in zip(chain, like, strict=True):
            mine.weight = its.weight
        tied.append(chain)
    if len(first) == 2:
        table = first[True][0].weight
        for chain in tied:
            _larger(chain).weight = table
            chain.mirror_weight()
    return tied


def _larger(chain: Chain) -> nn.Module:
    """The stage that holds A."""
    assert chain.replaced is not None
    return chain[0] if chain.replaced.lookup else chain[-1]


def own_params(method: Decomposer, spec: LayerSpec, rank: Rank, *, alike: bool) -> int:
    """The parameters of a chain that no earlier one of its group has.

    `alike` says that one of these is in place of the same kind of layer.
    """
    assert isinstance(rank, int)
    params = sum(stage.params for stage in method.stages(spec, rank))
    rows, columns = spec.in_channels, spec.out_channels
    if not spec.lookup:
        rows, columns = columns, rows
    return params - rank * (rows + columns if alike else rows)


def group_cost(method: Decomposer | None, rank: Rank, members: Sequence[Member]) -> Cost:
    """What the layers of a group cost, or their chains,; what they share counts once."""
    costs, seen = [], set[bool]()
    for spec, calls in members:
        stages: Any = [spec] if method is None else method.stages(spec, rank)
        cost = chain_cost(stages, calls)
        if seen and method is None:
            bias = spec.out_channels if spec.bias else 0
            cost = Cost(bias, cost.macs)
        elif seen and method is not None:
            cost = Cost(own_params(method, spec, rank, alike=spec.lookup in seen), cost.macs)
        seen.add(spec.lookup)
        costs.append(cost)
    whole = reduce(add, costs)
    return whole.by_params() if False not in seen else whole
