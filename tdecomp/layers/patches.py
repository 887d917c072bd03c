"""What each output of a layer sees: its input as rows of fan_in entries, a bounded slice at a time.

The entries of a row are in the order (*kernel, in / groups), which a channels-last copy of the
input has already; `to_kernel_order` reorders the sums over all rows, once, as the weight is.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from tdecomp.layers.spec import LayerSpec


def dense(x: Tensor) -> Tensor:
    """The same values in a plain tensor; refuses samples of several lengths."""
    if x.is_nested:
        raise ValueError(
            "got a nested tensor; expected padded ones, nested.to_padded_tensor(0.0), and for rows "
            "that do not count Data(batches, mask=...)"
        )
    return x if x.layout is torch.strided else x.to_dense()


def patches(
    x: Tensor, spec: LayerSpec, *, chunk_bytes: int = 4 * 2**20, least_rows: int = 2048
) -> Iterator[Tensor]:
    """Yield slices (groups, positions, fan_in) of a layer's unfolded input.

    `x` is (..., in) for a Linear, (batch, in, *size) or (in, *size) for a plain convolution. Slices
    fit a cache and have enough rows for an efficient matrix product.
    """
    rows = max(least_rows, chunk_bytes // (x.element_size() * spec.fan_in * spec.groups))
    if spec.ndim == 0:
        flat = x.reshape(1, -1, spec.in_channels)
        yield from flat.split(rows, dim=1)
        return
    batch = _batched(x, spec)
    pointwise = spec.kernel_volume == 1 and set(spec.stride) == {1} and not any(_padding(spec))
    out = spec.output_size(tuple(batch.shape[2:]))
    per_image = max(math.prod(out), 1)
    for images in batch.split(max(1, rows // per_image)):
        if pointwise:
            grouped = images.flatten(2).unflatten(1, (spec.groups, spec.group_in))
            yield grouped.permute(1, 0, 3, 2).reshape(spec.groups, -1, spec.group_in)
            continue
        windows = _windows(images, spec)  # (images, *out, *kernel, in)
        for lines in windows.split(max(1, rows * out[0] // per_image), dim=1):
            grouped = lines.unflatten(-1, (spec.groups, spec.group_in)).movedim(-2, 0)
            yield grouped.reshape(spec.groups, -1, spec.fan_in)


def count_patches(x: Tensor, spec: LayerSpec) -> int:
    """The number of positions that `patches` yields for this input."""
    if spec.ndim == 0:
        return x.numel() // (1 if spec.lookup else spec.in_channels)
    batch = _batched(x, spec)
    return len(batch) * math.prod(spec.output_size(tuple(batch.shape[2:])))


def channels_last(x: Tensor, spec: LayerSpec) -> Tensor:
    """The same values, stored so that patches are copied in few pieces; once for several calls."""
    return x.movedim(-1 - spec.ndim, -1).contiguous().movedim(-1, -1 - spec.ndim)


def patches_at(x: Tensor, spec: LayerSpec, places: Tensor) -> Tensor:
    """The rows (groups, places, fan_in) of `patches` at some places, without making the others.

    Of a lookup, the numbers (1, places) of the rows that it reads.
    """
    if spec.lookup:
        return x.reshape(1, -1)[:, places]
    if spec.ndim == 0:
        return x.reshape(-1, spec.in_channels)[places][None]
    batch = _batched(x, spec)
    # What the layer sees of an image whose pixels are their own numbers, from 1 on.
    size = batch.shape[2:]
    numbers = torch.arange(1, size.numel() + 1, dtype=torch.float64, device=x.device)
    plane = replace(spec, in_channels=1, out_channels=1, groups=1)
    seen = _windows(numbers.reshape(1, 1, *size), plane).reshape(-1, spec.kernel_volume).long() - 1
    pixels = seen[places % len(seen)]  # (places, kernel), -1 in the padding
    first = places // len(seen) * size.numel()
    flat = batch.movedim(1, -1).reshape(-1, spec.in_channels)
    rows = flat.index_select(0, (first[:, None] + pixels.clamp_min(0)).flatten())
    rows.index_fill_(0, (pixels < 0).flatten().nonzero()[:, 0], 0.0)
    grouped: Tensor = rows.reshape(len(places), -1, spec.groups, spec.group_in)
    return grouped.movedim(-2, 0).flatten(2)


def _batched(x: Tensor, spec: LayerSpec) -> Tensor:
    return x if x.dim() == spec.ndim + 2 else x[None]


def _windows(images: Tensor, spec: LayerSpec) -> Tensor:
    """A view (images, *out, *kernel, in) of the padded input, channels last."""
    if any(_padding(spec)):
        mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
        images = functional.pad(images, _padding(spec), mode=mode)
    last = images.movedim(1, -1).contiguous()  # (images, *size, in)
    out = replace(spec, padding="valid").output_size(tuple(last.shape[1:-1]))
    image, *spatial, channel = last.stride()
    along_out = (step * s for step, s in zip(spatial, spec.stride, strict=True))
    along_kernel = (step * d for step, d in zip(spatial, spec.dilation, strict=True))
    return last.as_strided(
        (len(last), *out, *spec.kernel_size, spec.in_channels),
        (image, *along_out, *along_kernel, channel),
    )


def _padding(spec: LayerSpec) -> list[int]:
    """As `functional.pad` wants it: from the last dimension to the first, both sides of each."""
    if spec.padding == "same":  # what is left over goes to the end, as in torch
        totals = [d * (k - 1) for d, k in zip(spec.dilation, spec.kernel_size, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    elif isinstance(spec.padding, str):
        sides = [(0, 0)] * spec.ndim
    else:
        sides = [(p, p) for p in spec.padding]
    return [side for pair in reversed(sides) for side in pair]


def to_kernel_order(values: Tensor, spec: LayerSpec, dims: tuple[int, ...]) -> Tensor:
    """Entries ordered (*kernel, in / groups) along `dims`, reordered as (in / groups, *kernel)."""
    if spec.kernel_volume == 1:
        return values
    shape = values.shape
    for dim in sorted(dims, reverse=True):
        values = values.unflatten(dim, (spec.kernel_volume, spec.group_in)).transpose(dim, dim + 1)
    return values.reshape(shape)


def each_output(spec: LayerSpec) -> LayerSpec:
    """The layer whose patches are the outputs of `spec`, one by one."""
    return replace(spec.pointwise(spec.out_channels, spec.out_channels), groups=1)


def output_rows(y: Tensor, spec: LayerSpec) -> Tensor:
    """A layer's output as rows (positions, out_channels), in the order of `patches`."""
    if spec.ndim:
        y = (y if y.dim() == spec.ndim + 2 else y[None]).movedim(1, -1)
    return y.reshape(-1, spec.out_channels)
