"""The layers of a model, with the reasons to leave some of them alone."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tdecomp.layers.spec import KINDS, Call, LayerSpec
from tdecomp.model.filters import Filters
from tdecomp.model.reasons import Reasons, is_layer, is_lazy, spec_of
from tdecomp.model.trace import Trace, trace


@dataclass(frozen=True)
class Site:
    """A layer of a model, with all of its names."""

    names: tuple[str, ...]  # in the order of `named_modules`; "" is the model itself
    module: nn.Module
    spec: LayerSpec | None  # None where the sizes are not known (lazy and quantized layers)
    reason: str | None = None  # why it is left alone; None if it may be replaced
    calls: tuple[Call, ...] | None = None  # in one pass of the example inputs, if there are any

    @property
    def name(self) -> str:
        return self.names[0]


class Sites(dict[str, Site]):
    """Every layer of a model by its first name, in the order of the model; made by `find_sites`."""

    trace: Trace | None = None  # of the example inputs


def find_sites(model: nn.Module, filters: Filters | None = None, example: Any = None) -> Sites:
    """Every layer of a known kind in `model`, with the reason if it is left alone.

    The filters leave out some layers; a ValueError for one of their patterns that matches none.
    With an example, sites have their calls in one pass of it, in which further reasons may show. A
    ValueError for a model without layers, wrapped, or that rejects the example.
    """
    _refuse_wrapped(model)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in names or is_layer(module):
            names.setdefault(module, []).append(name)
    if not names:
        raise ValueError(
            f"the model ({type(model).__name__}) has no Linear or convolution to decompose, nor a "
            f"layer of another known kind; the known ones are {', '.join(KINDS)} "
            "(tdecomp.register_layer_kind adds one)"
        )
    specs = {listed[0]: spec_of(module) for module, listed in names.items()}
    if filters is not None:
        filters.check([name for listed in names.values() for name in listed])
    sites, reasons = Sites(), Reasons(model)
    if example is not None:
        sites.trace = _traced(model, {n: spec for n, spec in specs.items() if spec}, example)
    for module, (name, *others) in names.items():
        spec, calls = specs[name], None
        reason = reasons.of(module, spec)
        if spec is not None:
            if filters is not None:
                reason = reason or filters.reason(module, (name, *others), spec)
            if sites.trace is not None:
                reason = reason or sites.trace.oddities.get(name)
                calls = tuple(sites.trace.calls[name])
        sites[name] = Site((name, *others), module, spec, reason, calls)
    return sites


def _traced(model: nn.Module, specs: Mapping[str, LayerSpec], example: Any) -> Trace:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{name!r} is on the meta device, so example_inputs cannot be run: load the "
                "weights first (model.to_empty(device=...), load_state_dict)"
            )
    # A forward pass would give the user's lazy layers their sizes: run a copy.
    lazy = any(is_lazy(module) for module in model.modules())
    return trace(copy.deepcopy(model) if lazy else model, specs, example)


def check_weight(site: Site) -> None:
    """Refuse weights that cannot be factorized."""
    layer = f"layer {site.name!r} ({site.spec})"
    for name, parameter in site.module.named_parameters(recurse=False):
        if parameter.is_meta:
            raise ValueError(
                f"{layer}: its {name} is on the meta device and has no values; load the weights "
                "first (model.to_empty(device=...), load_state_dict)"
            )
        finite = math.isfinite(float(parameter.detach().sum()))  # a sum is fast
        if not finite and (bad := int((~torch.isfinite(parameter)).sum())):
            raise ValueError(
                f"{layer}: {bad} of {parameter.numel()} entries of its {name} are NaN or infinite; "
                "expected finite values. Mend the weights or leave the layer alone with "
                f"exclude=[{site.name!r}]"
            )


def _refuse_wrapped(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    parallel = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
    for name in (kind.__name__ for kind in type(model).__mro__):
        if name in ("OptimizedModule", *parallel):
            inner = "model.module" if name in parallel else "model._orig_mod"
            raise ValueError(
                f"the model is wrapped in {name}: decompose the inner module ({inner}) first, then "
                "wrap the result"
            )
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("the model is a ScriptModule: decompose the eager model, then script it")
