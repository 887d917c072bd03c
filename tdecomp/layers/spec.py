"""What a layer is, apart from its weights, and what a kind of layers is; `kinds` lists them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tdecomp.files.typed import typed
from tdecomp.layers.geometry import Call, Geometry, all_whole

# What else a module is made with, by name.
Options = tuple[tuple[str, int | str | bool | None], ...]
# Shown in the text of a convolution where they differ from torch's defaults.
_SHOWN = ("stride", "padding", "dilation", "output_padding", "groups", "padding_mode")


@dataclass(frozen=True)
class LayerSpec(Geometry):
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
    parts : tuple of int
        Of a Linear that is several fused into one, such as queries, keys and values: how many of
        the outputs, in their order, belong to each; else empty. Specs that differ in it alone are
        equal, as their layers compute the same.
    options : tuple of (str, value)
        What else the module of this kind is made with, such as the `padding_idx` of an Embedding;
        empty for most.

    Raises
    ------
    ValueError
        If the channels are no multiples of `groups`, the parts are not all of the outputs of a
        Linear, or the other sizes are those of no layer.
    """

    kind: str = ""
    options: Options = ()
    parts: tuple[int, ...] = field(default=(), compare=False)

    # Fields that files of earlier versions lack.
    later: ClassVar[tuple[str, ...]] = ("options", "parts")

    def __post_init__(self) -> None:
        super().__post_init__()
        out, parts = self.out_channels, self.parts
        if parts and (self.ndim or not all_whole(parts, 1) or sum(parts) != out):
            raise ValueError(
                f"expected parts to be sizes of at least 1 that sum to the {out} outputs of a "
                f"Linear, got {parts!r}"
            )
        if not self.kind:
            convolution = f"Conv{'Transpose' if self.transposed else ''}{self.ndim}d"
            linear = "Linear" if self.groups == 1 else "GroupedLinear"
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
    def lookup(self) -> bool:
        """Whether its inputs are the numbers of rows of its weight, which it looks up."""
        return self.kind in KINDS and KINDS[self.kind].lookup

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight as the layer stores it."""
        return tuple(self.from_forward_layout(torch.empty(self.kernel_shape, device="meta")).shape)

    def call(self, input_shape: Iterable[int]) -> Call:
        """The `Call` that an input of this shape (batched or not) makes."""
        shape = tuple(input_shape)
        if self.ndim == 0:
            return Call(math.prod(shape if self.lookup else shape[:-1]))
        return Call(shape[0] if len(shape) == self.ndim + 2 else 1, shape[-self.ndim :])

    def called_with(self, *inputs: Any, **named: Any) -> Call | None:
        """The `Call` of these arguments; None if a chain could not follow it."""
        return self._kind.call(self, *inputs, **named)

    def macs(self, call: Call) -> int:
        """Multiply-accumulates of one call: half the flops that torch counts, without the bias."""
        if self.lookup:
            return 0
        # A transposed convolution uses its kernel once per input position.
        positions = call.size if self.transposed else self.output_size(call.size)
        macs = call.batch * math.prod(positions) * math.prod(self.kernel_shape)
        return macs if self.ndim else macs // self.groups  # of several Linears a row meets one

    # -- stages of chains in its place ------------------------------------------------------

    def like(self, **changes: Any) -> "LayerSpec":
        """The stock layer of torch with this geometry, and with some changes.

        A layer that looks rows up stays one, with its options.
        """
        stock = {} if self.lookup else {"kind": "", "options": (), "parts": ()}
        return replace(self, **{**stock, **changes})

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
    def chain(self) -> Any:
        """The class of the chains in such a layer's place, if not `Chain`."""
        return KINDS[self.kind].chain if self.kind in KINDS else None

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
        words += [f"{name}={value}" for name, value in self.options]
        if not self.bias and not self.lookup:
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
    lookup : bool
        Whether its inputs are the numbers of rows of its weight, which it looks up; the weight
        (out, in) in the forward layout has one column for each number.
    chain : type or None
        The class of the chains in place of such layers, if not `tdecomp.Chain`.
    """

    name: str
    computes: ClassVar[tuple[str, ...]] = ("forward",)
    lookup: ClassVar[bool] = False
    chain: ClassVar[Any] = None

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

    def refusal(self, module: nn.Module) -> str | None:
        """Why a layer of this kind must be left alone for what it is made with; None if not."""
        del module
        return None

    def call(self, spec: LayerSpec, *inputs: Any, **named: Any) -> Call | None:
        """The size of a call with these arguments; None if it has more than its input."""
        value, *more = (*inputs, *named.values())
        return None if more else spec.call(value.shape)

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
