"""The experts of transformers' mixtures, whose weights are (experts, …): grouped Linear layers."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tdecomp.layers.grouped_linear import GroupedLinear
from tdecomp.model.opened.base import Opened, own_weights

# What transformers says of a class of experts, whose layout and gate it then knows how to compute.
_SAYS = ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated")
_UP = ("gate_up_proj", "up_proj")  # with a gate, and without one


class OpenExperts(Opened):
    """The experts of one layer of a mixture, run group by group as transformers' `grouped_mm`.

    Tokens are sorted by expert, so that each product is a single grouped one.
    """

    names: ClassVar[tuple[str, ...]] = (*_UP, "down_proj")
    act_fn: Any
    down_proj: Any
    gate_up_proj: Any
    up_proj: Any
    post_expert_norm: Any
    num_experts: Any

    @classmethod
    def opens(cls, module: nn.Module) -> bool:
        if isinstance(module, Opened) or not vars(module).keys() >= {*_SAYS}:
            return False
        if "forward" in vars(module) or getattr(module, "_is_expert_parallel", False):
            return False
        if not (module.has_gate or hasattr(module, "act_fn")):
            return False
        up = _UP[not module.has_gate]
        names = [name for own in (up, "down_proj") for name in (own, f"{own}_bias")]
        held = own_weights(module, names)
        expected = {*names} if module.has_bias else {up, "down_proj"}
        others = {name for name, p in module._parameters.items() if p is not None} - expected
        if not held or held.keys() != expected or others or held[up].dim() != 3:
            return False
        groups: Any = module.num_experts  # of a single one the groups are no groups
        return bool(groups > 1 and len(held[up]) == groups)

    def open_up(self) -> None:
        held = self._parameters
        for name in (_UP[not self.has_gate], "down_proj"):
            weight, bias = held.pop(name), held.pop(f"{name}_bias", None)
            assert weight is not None
            layer = GroupedLinear.of(_transposed(weight) if self.is_transposed else weight, bias)
            self.add_module(name, layer.train(self.training))

    def close_up(self) -> None:
        for name in (_UP[not self.has_gate], "down_proj"):
            layer = self._modules.pop(name)
            assert isinstance(layer, GroupedLinear)
            weight = _transposed(layer.weight) if self.is_transposed else layer.weight
            self.register_parameter(name, weight)
            if layer.bias is not None:
                self.register_parameter(f"{name}_bias", layer.bias)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The mixture (tokens, hidden) of each token's experts, by their weights (tokens, k)."""
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        count, k = experts.numel(), top_k_index.shape[-1]
        # The number of the row after each expert's last: those of no expert come after all.
        numbers = torch.arange(self.num_experts, device=experts.device)
        ends = torch.searchsorted(experts, numbers, right=True).to(torch.int32)
        # Rows of no expert have no particular values, not even finite ones, nor have gradients.
        known = torch.arange(count, device=experts.device).unsqueeze(-1) < ends[-1]
        x = torch.where(known, hidden_states[order // k], 0.0)
        if self.has_gate:
            kind: Any = self.closed_class
            inner = kind._apply_gate(self, self.gate_up_proj(x, ends))
        else:
            inner = self.act_fn(self.up_proj(x, ends))
        out = self.down_proj(inner, ends)
        if getattr(self, "has_post_expert_norm", False):
            out = self.post_expert_norm(out)
        out = out * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        out = torch.where(known, out, 0.0)
        back = torch.empty_like(order)
        back[order] = torch.arange(count, device=order.device)
        mixed: Tensor = out[back].unflatten(0, (-1, k)).sum(dim=1)
        return mixed.to(hidden_states.dtype)


def _transposed(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(weight.data.transpose(1, 2), weight.requires_grad)
