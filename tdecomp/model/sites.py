"""The rows of a model: its layers and other weights, and why some are left alone."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tdecomp.layers.geometry import Call
from tdecomp.layers.spec import KINDS, LayerSpec
from tdecomp.model.filters import Filters
from tdecomp.model.fused import with_parts
from tdecomp.model.reasons import Reasons
from tdecomp.model.ties import settle
from tdecomp.model.trace import Trace, trace
from tdecomp.model.weights import is_layer, is_lazy, spec_of, weights_of

_LOAD = "load the weights first (model.to_empty(device=...), load_state_dict)"


@dataclass(frozen=True)
class Site:
    """A layer of a model, or another weight in it, with all of its names."""

    names: tuple[str, ...]  # in the order of `named_modules`; "" is the model itself
    module: nn.Module  # the layer, or the module that owns the weight
    spec: LayerSpec | None  # None where the sizes are not known (lazy and quantized layers)
    reason: str | None = None  # why it is left alone; None if it may be replaced
    calls: tuple[Call, ...] | None = None  # in one pass of the example inputs, if there are any
    macs: int | None = None  # of that pass
    parameters: tuple[nn.Parameter, ...] = ()  # that its row stands for
    # The names of the layers that have its weight and may share its factors, itself included.
    tied: tuple[str, ...] = ()
    group: tuple["Site", ...] = ()  # all of these, on the one that they are fitted as

    @property
    def name(self) -> str:
        return self.names[0]


class Sites(dict[str, Site]):
    """Every row of a model by its first name, in the order of the model; made by `find_sites`."""

    trace: Trace | None = None  # of the example inputs


def find_sites(model: nn.Module, filters: Filters | None = None, example: Any = None) -> Sites:
    """Every layer of a known kind in `model`, and every other weight of two or more dimensions.

    Each has its reason if it is left alone. The filters leave out some layers; a ValueError for one
    of their patterns that matches none. With an example, sites have their calls and MACs in one
    pass of it, in which further reasons may show. A ValueError for a model without layers, wrapped,
    or that rejects the example.
    """
    refuse_wrapped(model)
    rows = weights_of(model)
    if not any(is_layer(row.module) for row in rows):
        raise ValueError(
            f"the model ({type(model).__name__}) has no Linear or convolution to decompose, nor "
            f"another known layer ({', '.join(KINDS)}; tdecomp.register_layer_kind adds a kind)"
        )
    specs = {row.names[0]: with_parts(spec_of(row.module), row.names) for row in rows}
    if filters is not None:
        filters.check([name for row in rows for name in row.names])
    sites, reasons = Sites(), Reasons(model)
    if example is not None:
        sites.trace = _traced(model, {n: spec for n, spec in specs.items() if spec}, example)
    for row in rows:
        name, module, calls = row.names[0], row.module, None
        spec, reason = specs[name], reasons.of(row, specs[name])
        if spec is not None:
            if filters is not None:
                reason = reason or filters.reason(module, row.names, spec)
            if sites.trace is not None:
                reason = reason or sites.trace.oddities.get(name)
                calls = tuple(sites.trace.calls[name])
        macs = None if sites.trace is None else sites.trace.macs[name]
        tied = reasons.tied_to(module)
        sites[name] = Site(
            tuple(row.names), module, spec, reason, calls, macs, row.parameters, tied
        )
    settle(sites)
    return sites


def _traced(model: nn.Module, specs: Mapping[str, LayerSpec], example: Any) -> Trace:
    # A forward pass would give the user's lazy layers their sizes: run a copy.
    lazy = any(is_lazy(module) for module in model.modules())
    try:
        return trace(copy.deepcopy(model) if lazy else model, specs, example)
    except ValueError as error:
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(path, recurse=False):
                if parameter.is_meta and not hasattr(module, "_hf_hook"):  # which brings the values
                    words = f"{name!r} is on the meta device, example_inputs cannot run"
                    raise ValueError(f"{words}: {_LOAD}") from error
        raise


def check_weight(site: Site) -> None:
    """Refuse weights that cannot be factorized."""
    layer = f"layer {site.name!r} ({site.spec})"
    for name, parameter in site.module.named_parameters(recurse=False):
        if parameter.is_meta:
            raise ValueError(f"{layer}: its {name} is on the meta device, without values: {_LOAD}")
        finite = math.isfinite(float(parameter.detach().sum()))  # a sum is fast
        if not finite and (bad := int((~torch.isfinite(parameter)).sum())):
            raise ValueError(
                f"{layer}: {bad} of {parameter.numel()} entries of its {name} are NaN or infinite; "
                "expected finite values. Mend the weights or leave the layer alone with "
                f"exclude=[{site.name!r}]"
            )


def refuse_wrapped(model: nn.Module) -> None:
    """Raise an error for what is no module, or stands around the one whose layers are meant."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    parallel = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
    inner = {"OptimizedModule": "model._orig_mod"} | dict.fromkeys(parallel, "model.module")
    for name in (kind.__name__ for kind in type(model).__mro__):
        if name in inner:
            remedy = f"decompose the inner module ({inner[name]}), then wrap the result"
            raise ValueError(f"the model is wrapped in {name}: {remedy}")
    sharded = any(
        kind.__name__ == "FSDPModule" for m in model.modules() for kind in type(m).__mro__
    )
    if sharded or any(type(p.data).__name__ == "DTensor" for p in model.parameters()):
        remedy = "decompose the model before it is sharded (fully_shard, parallelize_module)"
        raise ValueError(f"the model is sharded, its parameters are DTensors: {remedy}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("the model is a ScriptModule: decompose the eager model, then script it")
