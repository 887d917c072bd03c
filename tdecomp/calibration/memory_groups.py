"""Layers in groups: the sums over the inputs of one group are in memory at a time."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tdecomp.calibration.accumulator import sums_bytes
from tdecomp.calibration.layer_inputs import Layers, shown_inputs
from tdecomp.calibration.memory import free_memory
from tdecomp.calibration.passes import PASSES, Batches
from tdecomp.layers.spec import LayerSpec
from tdecomp.model.batches import device_of
from tdecomp.runtime.torch_state import evaluating, exact_passes

_SHARE = 0.5  # of the free memory that sums take by default


def memory_groups(model: nn.Module, layers: Layers, batches: Batches) -> Sequence[Layers]:
    """Layers in groups whose sums stay under max_memory, which may take a pass to count patches."""
    limit = _limit(model, batches)
    if limit is None:
        return [layers]
    most = sum(sums_bytes(spec, 0, _dtype(layer)) for layer, spec in layers.values())
    if most <= limit:  # whatever the batches hold
        return [layers]
    passes = 1 if batches.data.augment is None else PASSES
    patches = dict.fromkeys(layers, 0)

    def count(name: str, x: Tensor) -> None:
        spec = layers[name][1]
        call = spec.call(x.shape)
        patches[name] += passes * call.batch * math.prod(spec.output_size(call.size))

    with evaluating(model), exact_passes(), shown_inputs(count, layers), torch.no_grad():
        for batch in batches.bar(device_of(model), "count patches"):
            batches.run(model, batch)
    groups: list[dict[str, tuple[nn.Module, LayerSpec]]] = []
    free = 0
    for name, (layer, spec) in layers.items():
        need = sums_bytes(spec, patches[name], _dtype(layer))
        if need > limit and batches.data.max_memory is not None:
            raise ValueError(
                f"calibrate: layer {name!r} ({spec}) alone needs {need:,} bytes; expected "
                f"max_memory of at least that, got {limit:,}; fewer batches (max_batches) "
                f"need less, as does a plan or decompose with exclude=[{name!r}]"
            )
        if not groups or need > free:
            groups.append({})
            free = limit
        groups[-1][name] = layer, spec
        free -= need
    return groups


def _limit(model: nn.Module, batches: Batches) -> int | None:
    """The bytes that sums may take: by default a share of what is free, where this is known."""
    given = batches.data.max_memory
    if given is not None:
        batches.require_several_passes("a max_memory")
        return given
    free = free_memory(device_of(model))
    return None if free is None or batches.single_pass else int(_SHARE * free)


def _dtype(layer: nn.Module) -> torch.dtype:
    """The precision of the products of a layer's inputs."""
    return torch.promote_types(next(layer.parameters()).dtype, torch.float32)
