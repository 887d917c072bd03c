"""Conv1D of transformers (all of GPT-2): a Linear that stores its weight as (in, out)."""

import importlib

import torch
from torch import Tensor, nn

from tdecomp.layers.spec import LayerKind, LayerSpec

# Where the class is defined: it is recognised by this name, without importing it.
_MODULES = ("transformers.pytorch_utils", "transformers.modeling_utils")


class Conv1D(LayerKind):
    """`transformers.pytorch_utils.Conv1D`, always with a bias."""

    name = "Conv1D"

    def base_class(self, module: nn.Module) -> type[nn.Module] | None:
        for base in type(module).__mro__:
            if base.__name__ == "Conv1D" and base.__module__ in _MODULES:
                return base
        return None

    def spec_of(self, module: nn.Module) -> LayerSpec:
        assert isinstance(module.weight, Tensor)
        into, out = module.weight.shape  # older versions have the attribute nf, but no nx
        return LayerSpec(into, out)

    def attributes(self, spec: LayerSpec) -> dict[str, int]:
        return {"nx": spec.in_channels, "nf": spec.out_channels}

    def build(
        self, spec: LayerSpec, device: torch.device | None, dtype: torch.dtype | None
    ) -> nn.Module:
        """Needs transformers, which a model that has such a layer has imported already."""
        stock = importlib.import_module(_MODULES[0]).Conv1D
        layer: nn.Module = stock(spec.out_channels, spec.in_channels)
        return layer.to(device, dtype)

    def to_forward_layout(self, weight: Tensor, spec: LayerSpec) -> Tensor:
        del spec
        return weight.T

    def from_forward_layout(self, kernel: Tensor, spec: LayerSpec) -> Tensor:
        del spec
        return kernel.T
