"""The kinds of torch's own layers: Linear, and convolutions in one to three dimensions."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tdecomp.layers.spec import LayerKind, LayerSpec

# Of a convolution: attributes of torch's modules, their arguments and fields of `LayerSpec`.
_SIZES = ("kernel_size", "stride", "padding", "dilation", "output_padding")
_OPTIONS = ("groups", "padding_mode")


class _Stock(LayerKind):
    """The layers of one of torch's own classes."""

    def __init__(self, stock: type[nn.Module]) -> None:
        self.name, self.stock = stock.__name__, stock
        without_values = {"reset_parameters": lambda _self: None}
        self._uninitialised = type(stock.__name__, (stock,), without_values)

    def base_class(self, module: nn.Module) -> type[nn.Module] | None:
        return self.stock if isinstance(module, self.stock) else None

    def _made(self, spec: LayerSpec, **options: Any) -> nn.Module:
        """`nn.utils.skip_init` at a tenth of its time, mostly spent on the meta device."""
        layer: nn.Module = self._uninitialised(spec.in_channels, spec.out_channels, **options)
        layer.__class__ = self.stock
        return layer


class Linear(_Stock):
    """`nn.Linear`, with weight (out, in)."""

    def spec_of(self, module: nn.Module) -> LayerSpec:
        assert isinstance(module, nn.Linear)
        into, out = int(module.in_features), int(module.out_features)
        return LayerSpec(into, out, bias=module.bias is not None)

    def attributes(self, spec: LayerSpec) -> dict[str, Any]:
        return {"in_features": spec.in_channels, "out_features": spec.out_channels}

    def build(
        self, spec: LayerSpec, device: torch.device | None, dtype: torch.dtype | None
    ) -> nn.Module:
        return self._made(spec, bias=spec.bias, device=device, dtype=dtype)


class Convolution(_Stock):
    """One of `nn.Conv1d` … `3d`, with weight (out, in / groups, *kernel)."""

    computes: ClassVar[tuple[str, ...]] = ("forward", "_conv_forward")

    def spec_of(self, module: nn.Module) -> LayerSpec:
        assert isinstance(module, nn.modules.conv._ConvNd)
        ndim = module.weight.dim() - 2
        sizes: dict[str, Any] = {name: _each(getattr(module, name), ndim) for name in _SIZES}
        return LayerSpec(
            int(module.in_channels),
            int(module.out_channels),
            groups=int(module.groups),
            padding_mode=module.padding_mode,
            bias=module.bias is not None,
            transposed=module.transposed,
            **sizes,
        )

    def attributes(self, spec: LayerSpec) -> dict[str, Any]:
        names = ("in_channels", "out_channels", "transposed", *_SIZES, *_OPTIONS)
        return {name: getattr(spec, name) for name in names}

    def build(
        self, spec: LayerSpec, device: torch.device | None, dtype: torch.dtype | None
    ) -> nn.Module:
        options = {name: getattr(spec, name) for name in (*_SIZES, *_OPTIONS, "bias")}
        if not spec.transposed:
            del options["output_padding"]
        return self._made(spec, **options, device=device, dtype=dtype)


class TransposedConvolution(Convolution):
    """One of `nn.ConvTranspose1d` … `3d`, with weight (in, out / groups, *kernel)."""

    computes = ("forward",)

    def to_forward_layout(self, weight: Tensor, spec: LayerSpec) -> Tensor:
        grouped = weight.reshape(spec.groups, spec.group_in, spec.group_out, *spec.kernel_size)
        return grouped.transpose(1, 2).reshape(spec.kernel_shape)

    def from_forward_layout(self, kernel: Tensor, spec: LayerSpec) -> Tensor:
        grouped = kernel.reshape(spec.groups, spec.group_out, spec.group_in, *spec.kernel_size)
        stored = (spec.in_channels, spec.group_out, *spec.kernel_size)
        return grouped.transpose(1, 2).reshape(stored)


def _each(size: Any, ndim: int) -> str | tuple[int, ...]:
    """One whole number for each dimension, of what torch takes: also False, or NumPy's numbers."""
    if isinstance(size, str):
        return size
    return tuple(map(int, size)) if isinstance(size, Sequence) else (int(size),) * ndim


STOCK_KINDS = (
    Linear(nn.Linear),
    *map(Convolution, (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
    *map(TransposedConvolution, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)),
)
STOCK_LAYERS = tuple(kind.stock for kind in STOCK_KINDS)
