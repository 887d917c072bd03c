"""Why a layer is left alone, as far as the model itself tells, without running it."""

from torch import nn
from torch.nn.utils import parametrize

from tdecomp.layers.chain import Chain
from tdecomp.layers.spec import LayerSpec, kind_of
from tdecomp.model.opened.base import Opened
from tdecomp.model.ties import groups_of, tied_in_words
from tdecomp.model.weights import Weights, is_layer, is_lazy, is_plain, is_quantized


class Reasons:
    """Why layers of one model cannot be replaced, as far as its structure shows."""

    def __init__(self, model: nn.Module) -> None:
        self._readers = _readers(model)
        # By the address of a storage: the ranges of it that parameters use, with their modules.
        self._users: dict[int, list[tuple[range, str]]] = {}
        for name, module in model.named_modules():
            for parameter in module.parameters(recurse=False):
                storage, used = _memory(parameter)
                self._users.setdefault(storage, []).append((used, name))
        self._names = {module: name for name, module in model.named_modules()}
        self._groups = groups_of(model, self._is_free)

    def tied_to(self, module: nn.Module) -> tuple[str, ...]:
        """The names of the layers that may share its factors, itself included; none if alone."""
        return tuple(self._names[member] for member in self._groups.get(module, ()))

    def _is_free(self, module: nn.Module) -> bool:
        return _own_reason(module) is None and module not in self._readers

    def of(self, row: Weights, spec: LayerSpec | None) -> str | None:
        """The reason; None if the layer may be replaced."""
        module = row.module
        if not is_layer(module):
            return self._readers.get(module) or f"no layer of a known kind: {row}"
        tied = None if module in self._groups else self._tie(module)
        reason = _own_reason(module) or tied or self._readers.get(module)
        if reason is None and spec is not None:
            shape = tuple(module._parameters["weight"].shape)  # type: ignore[union-attr]
            if shape != spec.weight_shape:
                return f"its weight is of shape {shape}, by its attributes of {spec.weight_shape}"
            if spec.depthwise:
                return "depthwise: each of its filters sees a single channel already"
        return reason

    def of_stage(self, stage: nn.Module) -> str | None:
        """The reason that a layer in a chain gives by itself, or by a parameter it shares."""
        return _own_reason(stage) or self._tie(stage)

    def _tie(self, module: nn.Module) -> str | None:
        """Whether it shares memory with another module's parameter."""
        for name, parameter in module.named_parameters(recurse=False):
            storage, mine = _memory(parameter)
            users = self._users[storage]
            owners = {user for r, user in users if r.start < mine.stop and mine.start < r.stop}
            if len(owners) > 1:
                return tied_in_words(owners, name)
        return None


def _own_reason(module: nn.Module) -> str | None:
    """The reason that the layer itself gives, apart from the model it is in."""
    if hasattr(module, "_hf_hook"):
        remedy = "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        return f"accelerate moves its weights or inputs: {remedy} with all weights in memory"
    if is_quantized(module):
        return "quantized: decompose first, then quantize"
    if is_lazy(module):
        return "lazy: run the model once so that its sizes are known"
    if parametrize.is_parametrized(module):
        remedy = "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
        return f"parametrized: bake it in with {remedy}"
    others = (name for name in ("weight", "bias") if name not in module._parameters)
    computed = [name for name in others if getattr(module, name, None) is not None]
    if computed or "weight" not in module._parameters:
        words = " and ".join(computed) or "weight"
        remedy = "bake it in (remove_weight_norm, remove_spectral_norm, prune.remove)"
        return f"its {words} is computed from other parameters: {remedy}"
    kind = kind_of(module)
    if kind is None:
        return f"{type(module).__name__} is no stock layer of torch"
    if reason := kind.refusal(module):
        return reason
    for name, parameter in module.named_parameters(recurse=False):
        dtype, kind_of_tensor = parameter.dtype, type(parameter.data).__name__
        if not is_plain(parameter):
            return f"its {name} is a {kind_of_tensor}: decompose plain tensors, then convert"
        if not dtype.is_floating_point or dtype.itemsize < 2:
            return f"weights of {dtype}: decompose in float32 or bfloat16, then convert"
        if not parameter.numel():
            remedy = "deepspeed.zero.GatheredParameters, or the unsharded model"
            return f"its {name} is empty, as where it is sharded: use {remedy}"
    for method in ("__call__", "_call_impl", *kind.computes):
        overridden = getattr(type(module), method) is not getattr(kind.base_class(module), method)
        if overridden or method in vars(module):
            return f"{type(module).__name__} overrides {method}"
    extra = {*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"}
    if extra:
        return f"it holds more than a weight and a bias: {', '.join(sorted(extra))}"
    if _own_hooks(module) or any(map(_own_hooks, module.parameters(recurse=False))):
        return "it has hooks of its own, which would be lost: remove them first"
    return None


_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_post_accumulate_grad_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


def _own_hooks(holder: nn.Module | nn.Parameter) -> bool:
    hooks = (hook for name in _HOOKS for hook in (getattr(holder, name, None) or {}).values())
    places = (getattr(getattr(hook, "hook", hook), "__module__", "") for hook in hooks)
    # torch leaves some of its own behind when a weight norm is removed.
    return any(not str(place).startswith("torch.nn.utils.") for place in places)


def _memory(parameter: nn.Parameter) -> tuple[int, range]:
    """The address of its storage, and the range of elements there from its first to its last."""
    if nn.parameter.is_lazy(parameter) or not parameter.numel():
        return 0, range(0)
    if parameter.is_meta or not is_plain(parameter):  # no storage, or one that is its own affair
        return id(parameter), range(1)
    strided = zip(parameter.shape, parameter.stride(), strict=True)
    first, length = parameter.storage_offset(), 1 + sum((n - 1) * step for n, step in strided)
    return parameter.untyped_storage().data_ptr(), range(first, first + length)


def _readers(model: nn.Module) -> dict[nn.Module, str]:
    """Layers whose weight their parent reads itself, and the layers of an earlier chain."""
    reasons: dict[nn.Module, str] = {}
    for parent in model.modules():
        if isinstance(parent, nn.MultiheadAttention) and not isinstance(parent, Opened):
            reasons[parent.out_proj] = "MultiheadAttention reads its weight itself"
        elif type(parent).__name__ in ("ShiftedWindowAttention", "ShiftedWindowAttentionV2"):
            # torchvision's Swin, which need not be installed here
            for name, child in parent.named_children():
                if name in ("qkv", "proj"):
                    reasons[child] = "shifted-window attention reads its weight itself"
        elif any(name.startswith(("base_layer", "lora_")) for name, _ in parent.named_children()):
            reason = "part of an adapter: merge it first (merge_and_unload), or adapt the result"
            reasons |= dict.fromkeys(parent.modules(), reason)
        elif isinstance(parent, Chain):
            reason = f"part of a chain that {parent.method!r} made before"
            reasons |= dict.fromkeys(parent.modules(), reason)
    return reasons
