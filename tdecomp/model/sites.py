"""Which layers of a model can be replaced, and why the others are left alone."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from tdecomp.layers.chain import Chain
from tdecomp.layers.spec import STOCK_LAYERS, Call, LayerSpec
from tdecomp.model.filters import Filters
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


def find_sites(
    model: nn.Module, filters: Filters | None = None, example_inputs: Any = None
) -> tuple[list[Site], Trace | None]:
    """Every Linear and convolution of `model`, once each, and what `example_inputs` showed.

    Raises
    ------
    TypeError, ValueError
        If the model is wrapped, has no layer to decompose, rejects the inputs, or a filter
        matches nothing.
    """
    _refuse_wrapped(model)
    filters = filters or Filters()
    names = _layer_names(model)
    if not names:
        raise ValueError(
            f"the model ({type(model).__name__}) has no Linear or convolution to decompose"
        )
    filters.check(name for all_names in names.values() for name in all_names)
    specs = {m: LayerSpec.of(m) for m in names if isinstance(m, STOCK_LAYERS) and not _lazy(m)}
    seen = None if example_inputs is None else _traced(model, specs, example_inputs)
    ties = _Ties(model)
    readers = _known_readers(model)

    def reason(module: nn.Module) -> str | None:
        structural = _structural_reason(module) or ties.reason(module) or readers.get(module)
        if structural is None and specs[module].depthwise:
            structural = "depthwise: each of its filters sees a single channel already"
        if structural is None and seen is not None:
            structural = seen.oddities.get(module)
        if structural is None:
            structural = filters.reason(module, names[module], specs[module])
        return structural

    sites = [
        Site(
            tuple(all_names),
            module,
            specs.get(module),
            reason(module),
            tuple(seen.calls[module]) if seen and module in specs else None,
        )
        for module, all_names in names.items()
    ]
    return sites, seen


def _traced(model: nn.Module, specs: Mapping[nn.Module, LayerSpec], example_inputs: Any) -> Trace:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{name!r} is on the meta device, so example_inputs cannot be run: load the "
                "weights first (model.to_empty(device=...), load_state_dict)"
            )
    if not any(_lazy(module) for module in model.modules()):
        return trace(model, specs, example_inputs)
    # A forward pass would give the user's lazy layers their sizes: run a copy.
    twin = copy.deepcopy(model)
    pairs = {
        new: old for new, old in zip(twin.modules(), model.modules(), strict=True) if old in specs
    }
    seen = trace(twin, {new: specs[old] for new, old in pairs.items()}, example_inputs)
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


def _layer_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, _ConvNd)) or _quantized(module):
            names.setdefault(module, []).append(name)
    return names


def _lazy(module: nn.Module) -> bool:
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


def _quantized(module: nn.Module) -> bool:
    kind = type(module)
    named = kind.__name__.startswith(("Linear", "Conv")) and "Packed" not in kind.__name__
    return named and "quantized" in kind.__module__


def _structural_reason(module: nn.Module) -> str | None:
    if _quantized(module):
        return "quantized: decompose first, then quantize"
    if _lazy(module):
        return "lazy: run the model once so that its sizes are known"
    if parametrize.is_parametrized(module):
        return (
            "parametrized: bake it in with torch.nn.utils.parametrize.remove_parametrizations"
            "(layer, 'weight')"
        )
    computed = [
        name
        for name in ("weight", "bias")
        if name not in module._parameters and getattr(module, name, None) is not None
    ]
    if computed or "weight" not in module._parameters:
        return (
            f"its {' and '.join(computed) or 'weight'} is computed from other parameters: bake it "
            "in (remove_weight_norm, remove_spectral_norm, prune.remove)"
        )
    stock = next((kind for kind in STOCK_LAYERS if isinstance(module, kind)), None)
    if stock is None:
        return f"{type(module).__name__} is no stock layer of torch"
    if any(parameter.is_complex() for parameter in module.parameters(recurse=False)):
        return "complex weights"
    for method in ("forward", "_conv_forward"):
        overridden = getattr(type(module), method, None) is not getattr(stock, method, None)
        if overridden or method in vars(module):
            return f"{type(module).__name__} overrides {method}"
    extra = {*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"}
    if extra:
        return f"it holds more than a weight and a bias: {', '.join(sorted(extra))}"
    if _own_hooks(module) or any(map(_own_hooks, module.parameters(recurse=False))):
        return "it has hooks of its own, which would be lost: remove them first"
    return None


def _own_hooks(holder: nn.Module | nn.Parameter) -> bool:
    for attribute in _HOOKS:
        for registered in (getattr(holder, attribute, None) or {}).values():
            hook = getattr(registered, "hook", registered)
            # torch leaves some of its own behind when a weight norm is removed.
            if not str(getattr(hook, "__module__", "")).startswith("torch.nn.utils."):
                return True
    return False


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_post_accumulate_grad_hooks",
)


class _Ties:
    """Finds layers that share memory with another module's parameter."""

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[int, list[tuple[int, int, str]]] = {}
        for name, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None and _storage(parameter):
                    place = (*_extent(parameter), name)
                    self._places.setdefault(_storage(parameter), []).append(place)

    def reason(self, module: nn.Module) -> str | None:
        for name, parameter in module.named_parameters(recurse=False):
            first, last = _extent(parameter) if _storage(parameter) else (0, 0)
            places = self._places.get(_storage(parameter), [])
            owners = {owner for low, high, owner in places if low < last and first < high}
            if len(owners) > 1:
                return f"its {name} is tied: {', '.join(sorted(map(repr, owners)))} share it"
        return None


def _storage(parameter: nn.Parameter) -> int:
    """The address of its memory, 0 if it has none."""
    if parameter.is_meta or isinstance(parameter, nn.parameter.UninitializedParameter):
        return 0
    return parameter.untyped_storage().data_ptr()


def _extent(parameter: nn.Parameter) -> tuple[int, int]:
    """The first element of its storage that it uses, and the one after the last."""
    strided = zip(parameter.shape, parameter.stride(), strict=True)
    first = int(parameter.storage_offset())
    return first, first + 1 + sum((int(size) - 1) * int(stride) for size, stride in strided)


def _known_readers(model: nn.Module) -> Mapping[nn.Module, str]:
    """Layers that their parent does not call, or not always, and those of an earlier chain."""
    reasons: dict[nn.Module, str] = {}
    for parent in model.modules():
        if isinstance(parent, nn.MultiheadAttention):
            reasons[parent.out_proj] = "MultiheadAttention reads its weight itself"
        elif isinstance(parent, nn.TransformerEncoderLayer):
            reasons[parent.linear1] = reasons[parent.linear2] = (
                "TransformerEncoderLayer's fast path reads its weight itself"
            )
        elif type(parent).__name__ in ("ShiftedWindowAttention", "ShiftedWindowAttentionV2"):
            # torchvision's Swin, which need not be installed here
            for child in (getattr(parent, "qkv", None), getattr(parent, "proj", None)):
                if isinstance(child, nn.Module):
                    reasons[child] = "shifted-window attention reads its weight itself"
        elif isinstance(parent, Chain):
            for stage in parent:
                reasons[stage] = f"part of a chain that {parent.method!r} made before"
    return reasons
