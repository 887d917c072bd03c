"""Chains from factors, and factors from chains."""

from typing import Any

import torch
from torch import Tensor, nn

from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.factors import Factorization
from tdecomp.layers.chain import Chain, Rank
from tdecomp.layers.spec import LayerSpec
from tdecomp.torch_state import undisturbed


def empty_chain(
    method: Decomposer,
    spec: LayerSpec,
    rank: Rank,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Chain:
    """The chain for a layer and a rank, with uninitialised weights."""
    layers = [stage.build(device, dtype) for stage in method.stages(spec, rank)]
    return Chain.from_stages(layers, method, rank, spec)


def empty_chain_like(layer: nn.Module, spec: LayerSpec, method: Decomposer, rank: Rank) -> Chain:
    """`empty_chain` with the layer's device, dtype, training mode and `requires_grad`."""
    weight = parameter(layer.weight)
    chain = empty_chain(method, spec, rank, weight.device, weight.dtype)
    for values in chain.parameters():
        values.requires_grad_(weight.requires_grad)
    if isinstance(layer.bias, nn.Parameter):
        parameter(chain[-1].bias).requires_grad_(layer.bias.requires_grad)
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
    spec, weight, bias = factors.spec, parameter(layer.weight), layer.bias
    with undisturbed(weight.device):
        chain = empty_chain_like(layer, spec, method, rank)
        write_factors(chain, method, factors)
        if isinstance(bias, nn.Parameter):
            parameter(chain[-1].bias).copy_(bias if shift is None else bias + shift)
    for dims, memory_format in {4: torch.channels_last, 5: torch.channels_last_3d}.items():
        # A kernel of size 1 is contiguous in every format, which says nothing about the layer.
        other = weight.dim() != dims or weight.is_contiguous()
        if not other and weight.is_contiguous(memory_format=memory_format):
            chain.to(memory_format=memory_format)  # type: ignore[call-overload]
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
    stages = method.stages(spec, rank)
    weights = [stage.read(part) for stage, part in zip(stages, chain, strict=True)]
    per_stage = [weight.chunk(spec.groups) for weight in weights]
    groups = [method.factors_of(parts) for parts in zip(*per_stage, strict=True)]
    known = tuple(factors for factors in groups if factors is not None)
    return Factorization(spec, known) if len(known) == spec.groups else None


def parameter(value: Any) -> nn.Parameter:
    """The value as the parameter that it has to be."""
    assert isinstance(value, nn.Parameter)
    return value
