"""The layers of a model, why some are left alone, and how one watched forward pass uses them."""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tdecomp.layers.spec import KINDS, Call, LayerSpec
from tdecomp.model.example import Example
from tdecomp.model.filters import Filters
from tdecomp.model.macs import MacCounter
from tdecomp.model.reasons import Reasons, is_layer, is_lazy, spec_of
from tdecomp.torch_state import evaluating, hooks, no_fast_path

_LOAD = "load the weights first (model.to_empty(device=...), load_state_dict)"


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


@dataclass(frozen=True)
class Trace:
    """What one forward pass of the example inputs showed, by the names of the layers."""

    calls: Mapping[str, list[Call]]  # of each watched layer; empty if it never ran
    total_macs: int  # of the whole pass
    oddities: Mapping[str, str]  # how a layer is used, if not by a call with its input alone


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
            f"the model ({type(model).__name__}) has no Linear or convolution to decompose, nor "
            f"another known layer ({', '.join(KINDS)}; tdecomp.register_layer_kind adds a kind)"
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
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.is_meta and not hasattr(module, "_hf_hook"):  # which brings the values
                raise ValueError(
                    f"{name!r} is on the meta device, example_inputs cannot run: {_LOAD}"
                )
    # A forward pass would give the user's lazy layers their sizes: run a copy.
    lazy = any(is_lazy(module) for module in model.modules())
    return trace(copy.deepcopy(model) if lazy else model, specs, example)


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


def _refuse_wrapped(model: nn.Module) -> None:
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


def trace(model: nn.Module, specs: Mapping[str, LayerSpec], example_inputs: Any) -> Trace:
    """Run `model` once in eval mode, its state restored; ValueError if it rejects the inputs."""
    example = Example.of(example_inputs)
    layers = {m: name for name, m in model.named_modules() if name in specs}
    calls: dict[str, list[Call]] = {name: [] for name in specs}
    oddities: dict[str, str] = {}
    reads = _WeightReads(layers, oddities)
    counter = MacCounter()

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = layers[layer]
        reads.running.append(name)
        value, *extra = (*args, *kwargs.values()) or (None,)
        if extra:
            oddities[name] = "it is called with more than its input"
        if isinstance(value, Tensor):  # if not, the layer itself is about to complain
            calls[name].append(specs[name].call(value.shape))

    def after(*_: Any) -> None:
        reads.running.pop()

    starts = [partial(m.register_forward_pre_hook, before, with_kwargs=True) for m in layers]
    ends = [partial(m.register_forward_hook, after, always_call=True) for m in layers]
    with evaluating(model), hooks(starts), hooks(ends):
        try:
            with torch.no_grad(), no_fast_path(), reads, counter:
                example.copied().run(model)
        except Exception as error:
            raise ValueError(
                f"the model rejected example_inputs ({example.describe()}): "
                f"{type(error).__name__}: {error}. Expected a tensor, a tuple of positional or a "
                "dict of keyword arguments of the model, or what forward(model, inputs) takes: "
                "forward=lambda model, inputs: ... says how else to call it"
            ) from error
    return Trace(calls, counter.macs, oddities)


# Reads of these need no values of a weight, and a chain answers them as the layer does.
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("dtype", "shape", "ndim", "requires_grad")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point),
}


class _WeightReads(TorchFunctionMode):
    """Notes layers whose weight a torch function is given while they are not running."""

    def __init__(self, layers: Mapping[nn.Module, str], oddities: dict[str, str]) -> None:
        super().__init__()
        self.running: list[str] = []
        self._oddities = oddities
        parameters = ((p, name) for m, name in layers.items() for p in m.parameters(recurse=False))
        self._owners = {id(p): name for p, name in parameters}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in () if func in _METADATA else _flat((args, kwargs or {})):
            owner = self._owners.get(id(value))
            if owner is not None and owner not in self.running:
                self._oddities.setdefault(owner, "its weight is read outside its own forward")
        return func(*args, **(kwargs or {}))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, tuple, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _flat(item)
    else:
        yield value
