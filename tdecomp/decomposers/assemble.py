"""Chains from factors, and factors from chains."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.factors import Factorization
from tdecomp.layers.chain import Chain, Rank
from tdecomp.layers.spec import LayerSpec
from tdecomp.torch_state import full_precision


def empty_chain(
    method: Decomposer,
    spec: LayerSpec,
    rank: Rank,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Chain:
    """The chain for a layer and a rank, with uninitialised weights."""
    layers = [stage.build(device, dtype) for stage in method.stages(spec, rank)]
    kind: type[Chain] = spec.chain or Chain
    return kind.from_stages(layers, method, rank, spec)


def empty_chain_like(layer: nn.Module, spec: LayerSpec, method: Decomposer, rank: Rank) -> Chain:
    """`empty_chain` with the layer's device, dtype, training mode and `requires_grad`."""
    weight = layer.get_parameter("weight")
    chain = empty_chain(method, spec, rank, weight.device, weight.dtype)
    chain.requires_grad_(weight.requires_grad)
    bias = getattr(layer, "bias", None)  # lookups have no such attribute
    if isinstance(bias, nn.Parameter):
        chain[-1].get_parameter("bias").requires_grad_(bias.requires_grad)
    chain.mirror_weight()
    return chain.train(layer.training)


def assemble(
    layer: nn.Module,
    method: Decomposer,
    rank: Rank,
    factors: Factorization,
    shift: Tensor | None = None,
) -> Chain:
    """The chain with these factors and the layer's bias, like the layer in everything else.

    `shift` (out,) is added to the bias of a layer that has one.
    """
    weight, bias = layer.get_parameter("weight"), getattr(layer, "bias", None)
    with full_precision(weight.device):
        chain = empty_chain_like(layer, factors.spec, method, rank)
        write_factors(chain, method, factors)
        if isinstance(bias, nn.Parameter):
            chain[-1].get_parameter("bias").copy_(bias if shift is None else bias + shift)
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
        # A kernel of size 1 is contiguous in every format, which says nothing about the layer.
        if last and not weight.is_contiguous() and weight.is_contiguous(memory_format=last):
            chain.to(memory_format=last)  # type: ignore[call-overload]
    return chain


def write_factors(chain: Chain, method: Decomposer, factors: Factorization) -> None:
    """Copy the factors into the weights of their chain."""
    assert chain.rank is not None
    stages = method.stages(factors.spec, chain.rank)
    for stage, part, values in zip(stages, chain, factors.stage_weights(), strict=True):
        stage.put(part, values)


def factors_of_chain(chain: Chain, method: Decomposer) -> Factorization | None:
    """The factors in float64 that a chain of this method holds, or None if it cannot tell."""
    spec, rank = chain.replaced, chain.rank
    assert spec is not None
    assert rank is not None
    stages = zip(method.stages(spec, rank), chain, strict=True)
    per_stage = [_by_group(stage.read(part), spec.groups) for stage, part in stages]
    groups = [method.factors_of(parts) for parts in zip(*per_stage, strict=True)]
    known = tuple(factors for factors in groups if factors is not None)
    return Factorization(spec, known) if len(known) == spec.groups else None


def _by_group(values: Any, groups: int) -> Sequence[Any]:
    """A stage's values for each group; those of a module of a method's own may be a tuple."""
    found: Sequence[Any] = (values,) if groups == 1 else values.chunk(groups)
    return found
