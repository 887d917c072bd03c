"""What a layer is, apart from its weights, and what a kind of layers is; `kinds` lists them."""

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tdecomp.files.typed import typed

# What has one entry for each dimension, and the least that each may be.
_LEAST = {"kernel_size": 0, "stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}
# Shown in the text of a convolution where they differ from torch's defaults.
_SHOWN = ("stride", "padding", "dilation", "output_padding", "groups", "padding_mode")


@dataclass(frozen=True)
class Call:
    """The size of one call of a layer: `batch` maps of spatial `size`, or vectors for a Linear."""

    batch: int
    size: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerSpec:
    """A Linear (no spatial dimension) or a convolution, without its weights.

    >>> spec = LayerSpec.of(nn.Conv2d(16, 32, 3, stride=2, padding=1))
    >>> spec.output_size((9, 9)), spec.params
    ((5, 5), 4640)

    Parameters
    ----------
    in_channels, out_channels : int
        Features for a Linear.
    kernel_size, stride, dilation, output_padding : tuple of int
        One entry per spatial dimension; empty for a Linear.
    padding : tuple of int or {"same", "valid"}
        As torch takes it: one entry per spatial dimension, or the name; empty for a Linear.
    groups : int
        Groups of channels that do not see each other; both channel counts are multiples of it.
    padding_mode : str
        As torch names it: "zeros", "reflect", "replicate" or "circular".
    bias : bool
        Whether the layer has a bias.
    transposed : bool
        Whether it is a transposed convolution.
    kind : str
        The name of a `LayerKind`; left out, it is torch's own layer of this geometry.

    Raises
    ------
    ValueError
        If the channels are no multiples of `groups`, or the other sizes are those of no layer.
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
    kind: str = ""

    def __post_init__(self) -> None:
        into, out, groups = self.in_channels, self.out_channels, self.groups
        whole = type(into) is type(out) is type(groups) is int and min(into, out, groups - 1) >= 0
        if not whole or into % groups or out % groups:
            raise ValueError(f"expected multiples of groups={groups!r}, got {into!r}→{out!r}")
        sizes = (self.kernel_size, self.stride, self.padding, self.dilation, self.output_padding)
        _check_sizes(sizes, self.transposed)
        if not self.kind:
            convolution = f"Conv{'Transpose' if self.transposed else ''}{self.ndim}d"
            linear = "Linear" if groups == 1 else "GroupedLinear"
            object.__setattr__(self, "kind", convolution if self.ndim else linear)

    @classmethod
    def of(cls, module: nn.Module) -> "LayerSpec":
        """The spec of a layer of a registered kind; a TypeError for any other module."""
        kind = kind_of(module)
        if kind is None:
            raise TypeError(
                f"expected a layer of a known kind ({', '.join(KINDS)}), got "
                f"{type(module).__name__}; tdecomp.register_layer_kind adds a kind"
            )
        return replace(kind.spec_of(module), kind=kind.name)

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
        """Whether each of several filters sees a single channel."""
        return self.groups > 1 and self.group_in == 1

    @property
    def kernel_volume(self) -> int:
        return math.prod(self.kernel_size)

    @property
    def fan_in(self) -> int:
        """Inputs that one output of a plain convolution sees: in / groups times the kernel."""
        return self.group_in * self.kernel_volume

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """(out, in / groups, *kernel): the shape of the weight in the forward layout."""
        return (self.out_channels, self.group_in, *self.kernel_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight as the layer stores it."""
        return tuple(self.from_forward_layout(torch.empty(self.kernel_shape, device="meta")).shape)

    @property
    def params(self) -> int:
        return math.prod(self.kernel_shape) + (self.out_channels if self.bias else 0)

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial size of the output for inputs of spatial `size`."""
        if self.padding == "same":
            return size
        padding = (0,) * self.ndim if isinstance(self.padding, str) else self.padding
        along = zip(size, self.kernel_size, self.stride, padding, self.dilation, strict=True)
        if self.transposed:
            least = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, p, d in along]
            return tuple(map(operator.add, least, self.output_padding))
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in along)

    def takes(self, call: Call) -> bool:
        """Whether there can be such a call."""
        sizes = (call.batch, *call.size)
        if len(call.size) != self.ndim or not _whole(sizes, 0):
            return False
        return _whole(self.output_size(call.size), 0)

    def call(self, input_shape: Iterable[int]) -> Call:
        """The `Call` that an input of this shape (batched or not) makes."""
        shape = tuple(input_shape)
        if self.ndim == 0:
            return Call(math.prod(shape[:-1]))
        return Call(shape[0] if len(shape) == self.ndim + 2 else 1, shape[-self.ndim :])

    def macs(self, call: Call) -> int:
        """Multiply-accumulates of one call: half the flops that torch counts, without the bias."""
        # A transposed convolution uses its kernel once per input position.
        positions = call.size if self.transposed else self.output_size(call.size)
        macs = call.batch * math.prod(positions) * math.prod(self.kernel_shape)
        return macs if self.ndim else macs // self.groups  # of several Linears a row meets one

    # -- stages of chains in its place ------------------------------------------------------

    def like(self, **changes: Any) -> "LayerSpec":
        """The stock layer of torch with this geometry, and with some changes."""
        return replace(self, **{"kind": "", **changes})

    def pointwise(self, in_channels: int, out_channels: int, *, bias: bool = False) -> "LayerSpec":
        """A kernel of size 1 (a Linear, where this is one) that keeps the spatial size."""
        one, zero = (1,) * self.ndim, (0,) * self.ndim
        geometry = (one, one, zero, one, zero)  # kernel, stride, padding, dilation, output_padding
        return LayerSpec(in_channels, out_channels, *geometry, groups=self.groups, bias=bias)

    def along(self, dims: Iterable[int], in_channels: int, out_channels: int) -> "LayerSpec":
        """This layer's geometry in the spatial dimensions `dims` and size 1 in the others."""
        keep, usual = set(dims), self.pointwise(in_channels, out_channels)
        picked: dict[str, Any] = {}
        for name in ("kernel_size", "stride", "padding", "dilation", "output_padding"):
            given = getattr(self, name)
            if not isinstance(given, str):  # padding "same" or "valid" stays
                pairs = enumerate(zip(given, getattr(usual, name), strict=True))
                picked[name] = tuple(mine if d in keep else other for d, (mine, other) in pairs)
        return self.like(in_channels=in_channels, out_channels=out_channels, bias=False, **picked)

    # -- its module: the `Stage` protocol ---------------------------------------------------

    def build(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
        """An uninitialised layer of this kind."""
        return self._kind.build(self, device, dtype)

    def put(self, module: Any, values: Tensor) -> None:
        """Write a weight (out, in / groups, *kernel) into a layer of this kind."""
        with torch.no_grad():
            module.weight.copy_(self.from_forward_layout(values))

    def read(self, module: Any) -> Tensor:
        """The weight (out, in / groups, *kernel) of a layer of this kind, detached, in float64."""
        return self.to_forward_layout(module.weight.detach().double())

    def to_forward_layout(self, weight: Tensor) -> Tensor:
        """The weight as (out, in / groups, *kernel), whichever way the layer stores it."""
        return self._kind.to_forward_layout(weight, self)

    def from_forward_layout(self, kernel: Tensor) -> Tensor:
        """(out, in / groups, *kernel) as the layer stores it: undoes `to_forward_layout`."""
        return self._kind.from_forward_layout(kernel, self)

    @property
    def attributes(self) -> dict[str, Any]:
        """What a layer of this kind has as plain attributes, such as its stride."""
        return self._kind.attributes(self)

    @property
    def _kind(self) -> "LayerKind":
        if self.kind not in KINDS:
            register = "register it (tdecomp.register_layer_kind)"
            raise ValueError(f"{self}: no layer kind has this name; {register}")
        return KINDS[self.kind]

    def __str__(self) -> str:
        words = [f"{self.in_channels}→{self.out_channels}"]
        if not self.ndim and self.groups > 1:
            words = [f"{self.group_in}→{self.group_out}", f"groups={self.groups}"]
        if self.ndim:
            words.append("×".join(map(str, self.kernel_size)))
            usual = replace(self.pointwise(self.in_channels, self.out_channels), groups=1)
            for label in _SHOWN:
                value = getattr(self, label)
                if value != getattr(usual, label):
                    same = isinstance(value, tuple) and len(set(value)) == 1
                    words.append(f"{label}={value[0] if same else value}")
        if not self.bias:
            words.append("no bias")
        return f"{self.kind}({', '.join(words)})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `LayerSpec.from_dict` brings it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "LayerSpec":
        """The inverse of `to_dict`, also after a round trip through JSON."""
        spec: LayerSpec = typed(cls, {"kind": "", **data}, "layer")
        return spec


@lru_cache(1024)  # chains of all ranks have few geometries
def _check_sizes(sizes: tuple[Any, ...], transposed: bool) -> None:
    for (name, least), given in zip(_LEAST.items(), sizes, strict=True):
        if name == "padding" and given in ("same", "valid") and not transposed:
            continue
        if not (isinstance(given, tuple) and len(given) == len(sizes[0]) and _whole(given, least)):
            raise ValueError(
                f"expected {name} to have a whole number of at least {least} for each dimension of "
                f"the kernel, got {given!r}"
            )


def _whole(numbers: Iterable[Any], least: int) -> bool:
    return all(isinstance(number, int) and number >= least for number in numbers)


class LayerKind(ABC):
    """How the layers of one kind are recognised, read, built and laid out.

    >>> spec = LayerSpec.of(nn.ConvTranspose2d(8, 4, 3))
    >>> spec.kind, spec.weight_shape  # as torch stores it: (in, out, *kernel)
    ('ConvTranspose2d', (8, 4, 3, 3))

    `tdecomp.register_layer_kind` shows one of one's own.

    A layer of any kind computes the same as torch's own layer of its spec, from parameters `weight`
    (its dimensions in any order) and `bias`.

    Attributes
    ----------
    name : str
        What `LayerSpec.kind` says and reports show: usually the name of the class.
    computes : tuple of str
        The methods that compute the output; a subclass that overrides one is left alone.
    takes_more : bool
        Whether layers are called with more than their input, as their chains then are.
    """

    name: str
    computes: ClassVar[tuple[str, ...]] = ("forward",)
    takes_more: ClassVar[bool] = False

    @abstractmethod
    def base_class(self, module: nn.Module) -> type[nn.Module] | None:
        """The class that `module` has from this kind, its own or a base; None for other modules."""

    @abstractmethod
    def spec_of(self, module: nn.Module) -> LayerSpec:
        """The sizes of a layer of this kind; `LayerSpec.of` adds the kind's name."""

    @abstractmethod
    def build(
        self, spec: LayerSpec, device: torch.device | None, dtype: torch.dtype | None
    ) -> nn.Module:
        """A layer with this spec whose weights need no particular values."""

    def attributes(self, spec: LayerSpec) -> dict[str, Any]:
        """The sizes and options that a layer has as attributes, which a chain then has, too."""
        del spec
        return {}

    def to_forward_layout(self, weight: Tensor, spec: LayerSpec) -> Tensor:
        """The weight as (out, in / groups, *kernel); a view where possible."""
        del spec
        return weight

    def from_forward_layout(self, kernel: Tensor, spec: LayerSpec) -> Tensor:
        """(out, in / groups, *kernel) as a layer of this kind stores it."""
        del spec
        return kernel


# By name, filled by `kinds`.
KINDS: dict[str, LayerKind] = {}


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of a module, of several the one registered last; None if no kind matches."""
    return next((kind for kind in reversed(KINDS.values()) if kind.base_class(module)), None)
