"""Chains from factors."""

import torch
from torch import Tensor, nn

from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.factors import Factorization
from tdecomp.layers.chain import Chain, Rank
from tdecomp.layers.layout import channels_last_of
from tdecomp.layers.spec import LayerSpec
from tdecomp.runtime.torch_state import full_precision


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
        if last := channels_last_of([weight]):
            chain.to(memory_format=last)  # type: ignore[call-overload]
    return chain


def write_factors(chain: Chain, method: Decomposer, factors: Factorization) -> None:
    """Copy the factors into the weights of their chain."""
    assert chain.rank is not None
    stages = method.stages(factors.spec, chain.rank)
    for stage, part, values in zip(stages, chain, factors.stage_weights(), strict=True):
        stage.put(part, values)
