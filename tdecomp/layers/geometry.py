"""The sizes of a Linear layer or a convolution, and torch's arithmetic of them."""

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

# What has one entry for each dimension, and the least that each may be.
_LEAST = {"kernel_size": 0, "stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}


@dataclass(frozen=True)
class Call:
    """The size of one call of a layer: `batch` maps of spatial `size`, or vectors for a Linear."""

    batch: int
    size: tuple[int, ...] = ()


@dataclass(frozen=True)
class Geometry:
    """Sizes that a layer may have; `LayerSpec` explains each."""

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

    def __post_init__(self) -> None:
        into, out, groups = self.in_channels, self.out_channels, self.groups
        whole = type(into) is type(out) is type(groups) is int and min(into, out, groups - 1) >= 0
        if not whole or into % groups or out % groups:
            raise ValueError(f"expected multiples of groups={groups!r}, got {into!r}→{out!r}")
        sizes = (self.kernel_size, self.stride, self.padding, self.dilation, self.output_padding)
        _check_sizes(sizes, self.transposed)

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
        if len(call.size) != self.ndim or not all_whole(sizes, 0):
            return False
        return all_whole(self.output_size(call.size), 0)


@lru_cache(1024)  # chains of all ranks have few geometries
def _check_sizes(sizes: tuple[Any, ...], transposed: bool) -> None:
    for (name, least), given in zip(_LEAST.items(), sizes, strict=True):
        if name == "padding" and given in ("same", "valid") and not transposed:
            continue
        fits = isinstance(given, tuple) and len(given) == len(sizes[0])
        if not (fits and all_whole(given, least)):
            raise ValueError(
                f"expected {name} to have a whole number of at least {least} for each dimension of "
                f"the kernel, got {given!r}"
            )


def all_whole(numbers: Iterable[Any], least: int) -> bool:
    """Whether all of them are whole numbers of at least that."""
    return all(isinstance(number, int) and number >= least for number in numbers)
