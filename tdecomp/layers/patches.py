"""The input patches of a layer, as rows of fan_in entries, in slices of bounded size.

The entries of a row are in the order (*kernel, in / groups), which a channels-last copy of the
input has in memory already; `to_kernel_order` brings sums over the rows, once, into the order of
the weight.
"""

import math
from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional

from tdecomp.layers.spec import LayerSpec

# The size of a slice: small enough to stay in a cache, large enough for an efficient product.
_CHUNK_BYTES = 4 * 2**20
_LEAST_ROWS = 2048


def patches(x: Tensor, spec: LayerSpec, rows: int | None = None) -> Iterator[Tensor]:
    """Yield slices (groups, positions, fan_in) of a layer's unfolded input.

    >>> conv = LayerSpec.of(nn.Conv2d(4, 8, 3, padding=1))
    >>> [rows.shape for rows in patches(torch.zeros(2, 4, 5, 5), conv)]
    [torch.Size([1, 50, 36])]

    Parameters
    ----------
    x : Tensor, shape (..., in) for a Linear, (batch, in, *size) or (in, *size) for a convolution
    spec : LayerSpec
        Of a layer that is not a transposed convolution.
    rows : int, optional
        About how many positions a slice holds, at least a line of an image; by default as many
        as stay in a cache.
    """
    if rows is None:
        row_bytes = x.element_size() * spec.fan_in * spec.groups
        rows = max(_LEAST_ROWS, _CHUNK_BYTES // row_bytes)
    if spec.ndim == 0:
        yield from x.reshape(1, -1, spec.in_channels).split(rows, dim=1)
        return
    batch = x if x.dim() == spec.ndim + 2 else x[None]
    if spec.kernel_volume == 1 and set(spec.stride) == {1} and not any(_padding(spec)):
        per_image = math.prod(batch.shape[2:])
        for images in batch.split(max(1, rows // max(per_image, 1))):
            grouped = images.flatten(2).unflatten(1, (spec.groups, spec.group_in))
            yield grouped.permute(1, 0, 3, 2).reshape(spec.groups, -1, spec.group_in)
        return
    out = spec.output_size(tuple(batch.shape[2:]))
    per_image = math.prod(out)
    for images in batch.split(max(1, rows // max(per_image, 1))):
        windows = _windows(images, spec)  # (images, *out, *kernel, in)
        for lines in windows.split(max(1, rows * out[0] // max(per_image, 1)), dim=1):
            grouped = lines.unflatten(-1, (spec.groups, spec.group_in)).movedim(-2, 0)
            yield grouped.reshape(spec.groups, -1, spec.fan_in)


def _windows(images: Tensor, spec: LayerSpec) -> Tensor:
    """A view (images, *out, *kernel, in) of the padded input, channels last."""
    if any(_padding(spec)):
        mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
        images = functional.pad(images, _padding(spec), mode=mode)
    last = images.movedim(1, -1).contiguous()  # (images, *size, in)
    count, size, strides = len(last), last.shape[1:-1], last.stride()
    spatial = strides[1:-1]
    out = tuple(
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(size, spec.kernel_size, spec.stride, spec.dilation, strict=True)
    )
    return last.as_strided(
        (count, *out, *spec.kernel_size, spec.in_channels),
        (
            strides[0],
            *(step * s for step, s in zip(spatial, spec.stride, strict=True)),
            *(step * d for step, d in zip(spatial, spec.dilation, strict=True)),
            strides[-1],
        ),
    )


def _padding(spec: LayerSpec) -> list[int]:
    """In the order of `functional.pad`: last dimension first, both sides of each."""
    if spec.padding == "same":  # an odd entry goes to the end, as in torch
        totals = [d * (k - 1) for d, k in zip(spec.dilation, spec.kernel_size, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    elif isinstance(spec.padding, str):
        sides = [(0, 0)] * spec.ndim
    else:
        sides = [(p, p) for p in spec.padding]
    return [side for pair in reversed(sides) for side in pair]


def to_kernel_order(values: Tensor, spec: LayerSpec, dims: tuple[int, ...]) -> Tensor:
    """Entries ordered (*kernel, in / groups) along `dims`, reordered as (in / groups, *kernel)."""
    shape = values.shape
    for dim in sorted(dims, reverse=True):
        split = values.unflatten(dim, (spec.kernel_volume, spec.group_in))
        values = split.transpose(dim, dim + 1)
    return values.reshape(shape)
