"""Layers and chains of random weights, to be timed: what they compute does not matter."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tdecomp.decomposers.base import Decomposer
from tdecomp.layers.chain import Rank
from tdecomp.layers.cost import Cost, chain_cost
from tdecomp.layers.spec import Call, LayerSpec
from tdecomp.layers.stage import Stage
from tdecomp.ranks.grid import Rounding, rank_steps
from tdecomp.timing.setting import in_layout
from tdecomp.timing.stopwatch import by_turns

# A layer, or the chain that may replace it.
Stages = tuple[Stage, ...]

# The smallest rank that is timed, as a share of the largest that saves MACs.
_SMALLEST = 0.06


def timed_ranks(
    decomposer: Decomposer, spec: LayerSpec, call: Call, rounding: Rounding, count: int
) -> list[Rank]:
    """The ranks at which a method's chains for this layer are timed."""

    def cost(rank: Rank) -> Cost:
        return chain_cost(decomposer.stages(spec, rank), (call,))

    limit = chain_cost((spec,), (call,)).deciding
    return rank_steps(decomposer.max_rank(spec), cost, limit, _SMALLEST, count, rounding)


def random_weights(module: nn.Module) -> nn.Module:
    """Fill a module's weights such that its outputs are about as large as its inputs.

    Arithmetic on denormal numbers, which vanishing outputs become, is slow.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return module.requires_grad_(False).eval()


def seconds_of(
    chains: Sequence[Stages],
    call: Call,
    layout: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    rounds: int,
    min_block: float,
) -> NDArray[np.float64]:
    """Seconds (rounds, chains) of one call of each, all by turns."""
    x = torch.ones(call.batch, chains[0][0].in_channels, *call.size, device=device, dtype=dtype)
    images: Tensor = in_layout(x, layout)
    modules = [_built(stages, layout, device, dtype) for stages in chains]
    with torch.inference_mode():
        calls = [partial(module, images) for module in modules]
        return by_turns(calls, rounds=rounds, min_block=min_block)


def _built(stages: Stages, layout: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    layers = [stage.build(device, dtype) for stage in stages]
    module: nn.Module = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
    ready: nn.Module = in_layout(random_weights(module), layout)
    return ready
