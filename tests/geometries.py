"""One table of layers that tests go through, and a strategy that draws more of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from tdecomp.layers.spec import LayerSpec

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (None, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Geometry:
    """A layer as a user writes it, and the spatial size of an input that it takes."""

    kind: type[nn.Module]
    channels: tuple[int, int]
    kernel: Any = ()
    size: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self):
        words = [f"{k}={v}" for k, v in self.options.items()]
        kernel = [] if self.kernel == () else [str(self.kernel)]
        text = f"{self.kind.__name__}({', '.join([*map(str, self.channels), *kernel, *words])})"
        return text.replace(" ", "")

    def layer(self, dtype=torch.float64, seed=0):
        """The layer with seeded Gaussian weights."""
        arguments = self.channels if self.kernel == () else (*self.channels, self.kernel)
        layer = self.kind(*arguments, **self.options, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator).double())
        return layer.to(dtype)

    def input(self, *batch, dtype=torch.float64, seed=1):
        """A seeded Gaussian input; without a batch it is a single, unbatched one."""
        generator = torch.Generator().manual_seed(seed)
        shape = (*batch, self.channels[0], *self.size)
        return torch.randn(shape, generator=generator).to(dtype)

    @cached_property
    def spec(self):
        return LayerSpec.of(self.layer())


@contextmanager
def case(*what: Any) -> Iterator[None]:
    """A failure inside names the case, for tests that go through many of them in one item."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"the case: {', '.join(map(str, what))}")
        raise


def _linear(*channels, **options):
    return Geometry(nn.Linear, channels, options=options)


def _conv1d(into, out, kernel, size=(9,), **options):
    return Geometry(nn.Conv1d, (into, out), kernel, size, options)


def _conv2d(into, out, kernel, size=(8, 7), **options):
    return Geometry(nn.Conv2d, (into, out), kernel, size, options)


def _conv3d(into, out, kernel, size=(4, 6, 5), **options):
    return Geometry(nn.Conv3d, (into, out), kernel, size, options)


def _up1d(into, out, kernel, size=(5,), **options):
    return Geometry(nn.ConvTranspose1d, (into, out), kernel, size, options)


def _up2d(into, out, kernel, size=(4, 3), **options):
    return Geometry(nn.ConvTranspose2d, (into, out), kernel, size, options)


def _up3d(into, out, kernel, size=(3, 2, 3), **options):
    return Geometry(nn.ConvTranspose3d, (into, out), kernel, size, options)


GEOMETRIES = (
    _linear(7, 5),
    _linear(5, 8, bias=False),
    _linear(1, 6),
    _linear(6, 1),
    # kernels
    _conv1d(4, 6, 3),
    _conv1d(5, 4, 4, padding=2, bias=False),
    _conv1d(6, 4, 1, stride=2),
    _conv2d(5, 6, 3),
    _conv2d(6, 4, 3, padding=1, bias=False),
    _conv2d(4, 5, (2, 4)),
    _conv2d(5, 4, (3, 1), padding=(1, 0)),
    _conv2d(4, 4, (1, 5), padding=(0, 2)),
    _conv2d(6, 5, 1),
    _conv2d(4, 6, 1, stride=(2, 3), padding=(1, 0), bias=False),
    _conv2d(1, 6, 3, padding=1),
    _conv2d(6, 1, 3, padding=1),
    _conv2d(1, 1, (2, 3)),
    _conv3d(4, 5, 2),
    _conv3d(3, 4, (2, 3, 1), padding=(1, 0, 0), bias=False),
    _conv3d(4, 3, 1, stride=(1, 2, 1)),
    # strides, paddings and dilations, each dimension's own
    _conv1d(4, 5, 3, stride=2, padding=1, dilation=2),
    _conv2d(4, 5, 3, stride=2, padding=1),
    _conv2d(5, 4, (3, 2), stride=(1, 2), padding=(0, 1)),
    _conv2d(4, 5, (2, 3), stride=(3, 1), padding=(1, 2), dilation=(1, 2), bias=False),
    _conv2d(4, 5, 3, padding=(2, 0), dilation=(3, 1)),
    _conv2d(4, 5, 1, padding=1),
    _conv3d(3, 4, (3, 2, 2), stride=(1, 2, 1), padding=(1, 0, 1), dilation=(1, 1, 2)),
    _conv1d(4, 5, 4, padding="same"),
    _conv2d(4, 5, 3, padding="same"),
    _conv2d(4, 5, (2, 4), padding="same", dilation=(1, 2), bias=False),
    _conv2d(4, 5, 3, padding="valid", stride=2),
    _conv3d(3, 4, (1, 3, 2), padding="same"),
    # padding modes
    _conv1d(4, 5, 3, padding=2, padding_mode="reflect"),
    _conv1d(4, 5, 3, padding=2, padding_mode="circular", stride=2),
    _conv2d(4, 5, 3, padding=(2, 1), padding_mode="reflect"),
    _conv2d(4, 5, (3, 2), padding=(1, 2), padding_mode="replicate", bias=False),
    _conv2d(4, 5, 3, padding=(0, 1), padding_mode="circular", stride=(2, 1)),
    _conv2d(4, 5, 1, padding=1, padding_mode="circular"),
    _conv2d(4, 5, (2, 3), padding="same", padding_mode="reflect"),
    _conv2d(4, 5, 3, padding="same", padding_mode="circular", dilation=2),
    _conv3d(3, 4, (2, 3, 2), padding=(1, 1, 0), padding_mode="replicate"),
    _conv3d(3, 4, (2, 3, 2), padding=(1, 1, 0), padding_mode="reflect"),
    # groups
    _conv1d(6, 4, 3, groups=2, padding=1),
    _conv2d(6, 9, 3, groups=3, padding=1),
    _conv2d(4, 8, (3, 2), groups=2, stride=(2, 1), padding=(0, 1), bias=False),
    _conv2d(6, 8, 1, groups=2),
    _conv2d(6, 8, 1, groups=2, stride=2, bias=False),
    _conv3d(4, 6, (2, 1, 3), groups=2),
    # transposed
    _up1d(4, 5, 3),
    _up1d(5, 4, 4, stride=3, padding=1, output_padding=2, bias=False),
    _up2d(4, 5, 3),
    _up2d(5, 4, 4, stride=2, padding=1),
    _up2d(4, 5, (2, 3), stride=(3, 2), padding=(0, 2), output_padding=(2, 1)),
    _up2d(4, 5, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1), output_padding=(1, 0)),
    _up2d(5, 4, 1, stride=2, output_padding=1),
    _up2d(5, 4, 1),
    _up2d(1, 4, 2, stride=2),
    _up2d(4, 1, (3, 1), bias=False),
    _up2d(6, 4, 3, groups=2, stride=2, padding=1, output_padding=1),
    _up2d(4, 6, 1, groups=2, bias=False),
    _up3d(3, 4, (2, 3, 1), stride=(2, 1, 2), output_padding=(1, 0, 1)),
    _up3d(4, 6, 2, groups=2, padding=(1, 0, 0), bias=False),
)

DEPTHWISE = (
    _conv1d(4, 4, 3, groups=4),
    _conv2d(4, 4, 3, groups=4, padding=1),
    _conv2d(4, 8, 3, groups=4),
    _conv2d(4, 4, 1, groups=4),
    _up2d(4, 4, 3, groups=4),
)


@st.composite
def geometries(draw, ndims=(1, 2, 3), largest_kernel=4, transposed=(False, True)):
    """A layer that torch accepts, with an input of about the smallest size that it takes."""
    ndim = draw(st.sampled_from(ndims))
    bias = draw(st.booleans())
    if ndim == 0:
        channels = (draw(st.integers(1, 8)), draw(st.integers(1, 8)))
        return Geometry(nn.Linear, channels, options={"bias": bias})
    is_transposed = draw(st.sampled_from(transposed))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    width = 5 if groups == 1 else 3
    # One input channel in each of several groups is a depthwise layer.
    into = groups * draw(st.integers(1 if groups == 1 else 2, width))
    out = groups * draw(st.integers(1, width))

    def each(least, most):
        return st.tuples(*[st.integers(least, most)] * ndim)

    kernel = draw(each(1, min(largest_kernel, 3) if ndim == 3 else largest_kernel))
    options = {"dilation": draw(each(1, 2)), "groups": groups, "bias": bias}
    reach = [d * (k - 1) for d, k in zip(options["dilation"], kernel, strict=True)]
    extra = draw(each(0, 2))
    if is_transposed:
        stride, padding = draw(each(1, 3)), draw(each(0, 2))
        steps = zip(stride, options["dilation"], strict=True)
        output_padding = tuple(draw(st.integers(0, max(pair) - 1)) for pair in steps)
        options |= {"stride": stride, "padding": padding, "output_padding": output_padding}
        # The smallest n with (n - 1) · stride - 2 · padding + reach + output_padding + 1 >= 1.
        smallest = [
            1 + max(0, -((r + o - 2 * p) // s))
            for r, o, p, s in zip(reach, output_padding, padding, stride, strict=True)
        ]
        size = tuple(n + e for n, e in zip(smallest, extra, strict=True))
        return Geometry(_TRANSPOSED[ndim], (into, out), kernel, size, options)
    padding = draw(st.one_of(each(0, 3), st.sampled_from(["same", "valid"])))
    stride = (1,) * ndim if padding == "same" else draw(each(1, 3))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    options |= {"stride": stride, "padding": padding, "padding_mode": mode}
    if padding == "same":
        padded = [r - r // 2 for r in reach]
    else:
        padded = [0] * ndim if padding == "valid" else list(padding)
    # Reflection needs more than it pads with, wrapping around as much.
    size = tuple(
        max(r + 1 - 2 * p * (padding != "same"), p + 1) + e
        for r, p, e in zip(reach, padded, extra, strict=True)
    )
    return Geometry(_PLAIN[ndim], (into, out), kernel, size, options)
