"""The layers of a model: found once, then looked at with filters and with example inputs."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, eq=False)
class Sites(Mapping[str, Site]):
    """Every layer of a model by its first name, in the order of the model; made by `find_sites`."""

    model: nn.Module
    _sites: dict[str, Site]
    trace: Trace | None = None  # of the example inputs

    def __getitem__(self, name: str) -> Site:
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def with_filters(self, filters: Filters) -> "Sites":
        """The same sites, with a reason where the filters leave one out.

        A pattern that matches no layer is a ValueError.
        """
        filters.check(name for site in self.values() for name in site.names)

        def filtered(site: Site) -> Site:
            if site.reason is not None or site.spec is None:
                return site
            return replace(site, reason=filters.reason(site.module, site.names, site.spec))

        return replace(self, _sites={name: filtered(site) for name, site in self.items()})

    def with_example(self, example: Any) -> "Sites":
        """The same sites, with their calls in one pass of the example inputs.

        Some reasons to leave a layer alone show only in this pass. A ValueError is raised if the
        model rejects the inputs or has parameters on the meta device.
        """
        seen = _traced(self.model, {s.module: s.spec for s in self.values() if s.spec}, example)

        def watched(site: Site) -> Site:
            calls = tuple(seen.calls[site.module]) if site.spec else None
            reason = site.reason or seen.oddities.get(site.module)
            return replace(site, calls=calls, reason=reason)

        sites = {name: watched(site) for name, site in self.items()}
        return replace(self, _sites=sites, trace=seen)


def find_sites(model: nn.Module, filters: Filters | None = None, example: Any = None) -> Sites:
    """Every layer of a known kind in `model`; a ValueError if it has none or is wrapped.

    For `filters` and `example` see `Sites.with_filters` and `Sites.with_example`.
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
    reasons, found = Reasons(model), {}
    for module, listed in names.items():
        spec = spec_of(module)
        found[listed[0]] = Site(tuple(listed), module, spec, reasons.of(module, spec))
    sites = Sites(model, found)
    if filters is not None:
        sites = sites.with_filters(filters)
    return sites if example is None else sites.with_example(example)


def _traced(model: nn.Module, specs: Mapping[nn.Module, LayerSpec], example: Any) -> Trace:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{name!r} is on the meta device, so example_inputs cannot be run: load the "
                "weights first (model.to_empty(device=...), load_state_dict)"
            )
    if not any(is_lazy(module) for module in model.modules()):
        return trace(model, specs, example)
    # A forward pass would give the user's lazy layers their sizes: run a copy.
    twin = copy.deepcopy(model)
    originals = dict(zip(twin.modules(), model.modules(), strict=True))
    twins = {new: specs[old] for new, old in originals.items() if old in specs}
    seen = trace(twin, twins, example)
    calls = {originals[new]: calls for new, calls in seen.calls.items()}
    oddities = {originals[new]: words for new, words in seen.oddities.items()}
    return Trace(calls, seen.total_macs, oddities)


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
