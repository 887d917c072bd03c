"""What a Linear or a convolution is, apart from its weights.

A `LayerSpec` is all that planning, costing and building need to know of a layer: a chain is a
tuple of them, so that parameters, MACs and output sizes of the layer and of everything that may
replace it come from the same arithmetic.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

_CONVOLUTIONS: dict[tuple[int, bool], type[nn.Module]] = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}
STOCK_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVOLUTIONS.values())


# The same without values drawn for their weights.
_WITHOUT_VALUES: dict[type[nn.Module], type[nn.Module]] = {
    kind: type(kind.__name__, (kind,), {"reset_parameters": lambda _self: None})
    for kind in STOCK_LAYERS
}


def _uninitialised(kind: type[nn.Module], *args: Any, **options: Any) -> Any:
    """`nn.utils.skip_init` at a tenth of its time, which goes into drawing on the meta device."""
    layer = _WITHOUT_VALUES[kind](*args, **options)
    layer.__class__ = kind
    return layer


@dataclass(frozen=True)
class Call:
    """The size of one call of a layer: `batch` maps of spatial `size`.

    A Linear has no spatial size: there `batch` counts the vectors.
    """

    batch: int
    size: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerSpec:
    """A Linear (no spatial dimension) or a convolution, without its weights.

    >>> spec = LayerSpec.of(nn.Conv2d(16, 32, 3, stride=2, padding=1))
    >>> spec.output_size((9, 9)), spec.macs(Call(1, (9, 9)))
    ((5, 5), 115200)

    Every tuple has one entry per spatial dimension; `padding` may be "same" or "valid" instead.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    bias: bool = True
    transposed: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> "LayerSpec":
        """Read the spec off a Linear or a (transposed) convolution."""
        if isinstance(module, nn.Linear):
            return cls(module.in_features, module.out_features, bias=module.bias is not None)
        if isinstance(module, nn.modules.conv._ConvNd):
            return cls(
                in_channels=module.in_channels,
                out_channels=module.out_channels,
                kernel_size=tuple(module.kernel_size),
                stride=tuple(module.stride),
                padding=module.padding
                if isinstance(module.padding, str)
                else tuple(module.padding),
                dilation=tuple(module.dilation),
                output_padding=tuple(module.output_padding),
                groups=module.groups,
                padding_mode=module.padding_mode,
                bias=module.bias is not None,
                transposed=module.transposed,
            )
        raise TypeError(f"expected a Linear or a convolution, got {type(module).__name__}")

    # -- shapes -----------------------------------------------------------------------------

    @property
    def ndim(self) -> int:
        """Spatial dimensions: 0 for a Linear."""
        return len(self.kernel_size)

    @property
    def group_in(self) -> int:
        return self.in_channels // self.groups

    @property
    def group_out(self) -> int:
        return self.out_channels // self.groups

    @property
    def depthwise(self) -> bool:
        """Whether each filter of several sees a single channel."""
        return self.groups > 1 and self.group_in == 1

    @property
    def kernel_volume(self) -> int:
        return math.prod(self.kernel_size)

    @property
    def fan_in(self) -> int:
        """Inputs that one output of a plain convolution sees: in / groups times the kernel."""
        return self.group_in * self.kernel_volume

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight in torch's own layout."""
        if self.transposed:
            return (self.in_channels, self.group_out, *self.kernel_size)
        return (self.out_channels, self.group_in, *self.kernel_size)

    @property
    def params(self) -> int:
        return math.prod(self.weight_shape) + (self.out_channels if self.bias else 0)

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial size of the output for inputs of spatial `size`."""
        if self.padding == "same":
            return size
        padding = (0,) * self.ndim if isinstance(self.padding, str) else self.padding
        if self.transposed:
            return tuple(
                (n - 1) * s - 2 * p + d * (k - 1) + o + 1
                for n, k, s, p, d, o in zip(
                    size,
                    self.kernel_size,
                    self.stride,
                    padding,
                    self.dilation,
                    self.output_padding,
                    strict=True,
                )
            )
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(
                size, self.kernel_size, self.stride, padding, self.dilation, strict=True
            )
        )

    def call(self, input_shape: Iterable[int]) -> Call:
        """The `Call` that an input of this shape (batched or not) makes."""
        shape = tuple(input_shape)
        if self.ndim == 0:
            return Call(math.prod(shape[:-1]))
        batched = len(shape) == self.ndim + 2
        return Call(shape[0] if batched else 1, shape[-self.ndim :])

    def macs(self, call: Call) -> int:
        """Multiply-accumulates of one call, as torch's flop counter counts them (halved).

        The bias is not counted. A transposed convolution uses its kernel once per input position.
        """
        positions = call.size if self.transposed else self.output_size(call.size)
        return call.batch * math.prod(positions) * math.prod(self.weight_shape)

    # -- layouts ----------------------------------------------------------------------------

    def to_forward_layout(self, weight: Tensor) -> Tensor:
        """The weight as (out, in / groups, *kernel), whichever way the layer stores it."""
        if not self.transposed:
            return weight
        grouped = weight.reshape(self.groups, self.group_in, self.group_out, *self.kernel_size)
        return grouped.transpose(1, 2).reshape(self.out_channels, self.group_in, *self.kernel_size)

    def from_forward_layout(self, kernel: Tensor) -> Tensor:
        """(out, in / groups, *kernel) as the layer stores it: undoes `to_forward_layout`."""
        if not self.transposed:
            return kernel
        grouped = kernel.reshape(self.groups, self.group_out, self.group_in, *self.kernel_size)
        return grouped.transpose(1, 2).reshape(self.weight_shape)

    # -- other layers of the same kind ------------------------------------------------------

    def pointwise(
        self, in_channels: int, out_channels: int, *, bias: bool = False, groups: int | None = None
    ) -> "LayerSpec":
        """A kernel of size 1 (a Linear, where this is one) that keeps the spatial size."""
        ones, zeros = (1,) * self.ndim, (0,) * self.ndim
        return LayerSpec(
            in_channels,
            out_channels,
            kernel_size=ones,
            stride=ones,
            padding=zeros,
            dilation=ones,
            output_padding=zeros,
            groups=self.groups if groups is None else groups,
            bias=bias,
        )

    def along(self, dims: Iterable[int], in_channels: int, out_channels: int) -> "LayerSpec":
        """This layer's geometry in the spatial dimensions `dims` and size 1 in the others."""
        keep = set(dims)

        def pick(values: tuple[int, ...], other: int) -> tuple[int, ...]:
            return tuple(v if d in keep else other for d, v in enumerate(values))

        return replace(
            self,
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=pick(self.kernel_size, 1),
            stride=pick(self.stride, 1),
            padding=self.padding if isinstance(self.padding, str) else pick(self.padding, 0),
            dilation=pick(self.dilation, 1),
            output_padding=pick(self.output_padding, 0),
            bias=False,
        )

    def build(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
        """An uninitialised stock torch layer of this kind."""
        if self.ndim == 0:
            return _uninitialised(
                nn.Linear,
                self.in_channels,
                self.out_channels,
                bias=self.bias,
                device=device,
                dtype=dtype,
            )
        transposed_only = {"output_padding": self.output_padding} if self.transposed else {}
        return _uninitialised(
            _CONVOLUTIONS[self.ndim, self.transposed],
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias,
            padding_mode=self.padding_mode,
            device=device,
            dtype=dtype,
            **transposed_only,
        )

    # -- words ------------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        """The name of the torch class."""
        return "Linear" if not self.ndim else _CONVOLUTIONS[self.ndim, self.transposed].__name__

    def __str__(self) -> str:
        words = [f"{self.in_channels}→{self.out_channels}"]
        if self.ndim:
            words.append("×".join(map(str, self.kernel_size)))
            ones, zeros = (1,) * self.ndim, (0,) * self.ndim
            shown = {
                "stride": (self.stride, ones),
                "padding": (self.padding, zeros),
                "dilation": (self.dilation, ones),
                "output_padding": (self.output_padding, zeros),
                "groups": (self.groups, 1),
                "padding_mode": (self.padding_mode, "zeros"),
            }
            for label, (value, usual) in shown.items():
                if value != usual:
                    words.append(f"{label}={_short(value)}")
        if not self.bias:
            words.append("no bias")
        return f"{self.kind}({', '.join(words)})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `LayerSpec.from_dict` brings it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "LayerSpec":
        """The inverse of `to_dict`, also after a round trip through JSON."""
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data.items()
        }
        return cls(**values)


def _short(value: Any) -> str:
    if isinstance(value, tuple) and len(set(value)) == 1:
        return str(value[0])
    return str(value)
