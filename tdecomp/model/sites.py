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
    """A layer with every name it is reachable by, or the reason it is left alone.

    Attributes
    ----------
    names : tuple of str
        In the order of `named_modules`; the first one is the site's name, "" the model itself.
    module : nn.Module
    spec : LayerSpec or None
        None where the layer's sizes are not known (lazy and quantized layers).
    reason : str or None
        Why it is left alone; None if it may be replaced.
    calls : tuple of Call or None
        What one pass of the example inputs asks of it; None without example inputs.
    """

    names: tuple[str, ...]
    module: nn.Module
    spec: LayerSpec | None
    reason: str | None = None
    calls: tuple[Call, ...] | None = None

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True, eq=False)
class Sites(Mapping[str, Site]):
    """Every layer of a model by its name, in the order of the model; `find_sites` makes it.

    >>> sites = find_sites(nn.Sequential(nn.Linear(4, 2), nn.ReLU()))
    >>> {name: str(site.spec) for name, site in sites.items()}
    {'0': 'Linear(4→2)'}

    Nothing is searched again by `with_filters` and `with_example`, which return new sites.

    Attributes
    ----------
    model : nn.Module
    trace : Trace or None
        What the example inputs showed.
    """

    model: nn.Module
    _sites: dict[str, Site]
    trace: Trace | None = None

    def __getitem__(self, name: str) -> Site:
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def with_filters(self, filters: Filters) -> "Sites":
        """The same sites; those that the filters leave out have that as their reason.

        Raises
        ------
        ValueError
            If a pattern matches no layer.
        """
        filters.check(name for site in self.values() for name in site.names)

        def filtered(site: Site) -> Site:
            if site.reason is not None or site.spec is None:
                return site
            return replace(site, reason=filters.reason(site.module, site.names, site.spec))

        return replace(self, _sites={name: filtered(site) for name, site in self.items()})

    def with_example(self, example: Any) -> "Sites":
        """The same sites with the calls that one pass of the example inputs makes of them.

        A layer with a peculiarity that only a pass shows gets this as its reason.

        Raises
        ------
        ValueError
            If the model rejects the inputs, or has parameters on the meta device.
        """
        seen = _traced(self.model, {s.module: s.spec for s in self.values() if s.spec}, example)

        def watched(site: Site) -> Site:
            calls = tuple(seen.calls[site.module]) if site.spec else None
            reason = site.reason or seen.oddities.get(site.module)
            return replace(site, calls=calls, reason=reason)

        sites = {name: watched(site) for name, site in self.items()}
        return replace(self, _sites=sites, trace=seen)


def find_sites(model: nn.Module, filters: Filters | None = None, example: Any = None) -> Sites:
    """Every layer of a known kind in `model`, once each, by its first name.

    Parameters
    ----------
    model : nn.Module
    filters : Filters, optional
        As `Sites.with_filters`.
    example : optional
        As `Sites.with_example`.

    Raises
    ------
    TypeError, ValueError
        If the model is wrapped, has no layer to decompose, rejects the inputs, or a filter
        matches nothing.
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
    reasons = Reasons(model)
    found: dict[str, Site] = {}
    for module, all_names in names.items():
        spec = spec_of(module)
        found[all_names[0]] = Site(tuple(all_names), module, spec, reasons.of(module, spec))
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
    pairs = {
        new: old for new, old in zip(twin.modules(), model.modules(), strict=True) if old in specs
    }
    seen = trace(twin, {new: specs[old] for new, old in pairs.items()}, example)
    return Trace(
        {pairs[new]: calls for new, calls in seen.calls.items()},
        seen.total_macs,
        {pairs[new]: words for new, words in seen.oddities.items()},
    )


def _refuse_wrapped(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    wrappers = {
        "OptimizedModule": "model._orig_mod",
        "DistributedDataParallel": "model.module",
        "DataParallel": "model.module",
        "FullyShardedDataParallel": "model.module",
    }
    for kind in type(model).__mro__:
        if kind.__name__ in wrappers:
            raise ValueError(
                f"the model is wrapped in {kind.__name__}: decompose the inner module "
                f"({wrappers[kind.__name__]}) first, then wrap the result"
            )
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("the model is a ScriptModule: decompose the eager model, then script it")
