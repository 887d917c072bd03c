"""Sums over batches of a layer's input patches, and of its outputs for them."""

import copy
import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tdecomp.calibration.layer_moments import LayerMoments, is_widest, sample_size
from tdecomp.layers.patches import (
    channels_last,
    count_patches,
    dense,
    each_output,
    output_rows,
    patches,
    patches_at,
    to_kernel_order,
)
from tdecomp.layers.spec import LayerSpec
from tdecomp.runtime.torch_state import full_precision

# A symmetric product is computed from the diagonal downwards only, in at most _BLOCKS blocks of at
# least _BLOCK columns each.
_BLOCK = 96
_BLOCKS = 4
# A fit hardly gains from more patches than this for each entry of a patch, and this many in all.
_PATCHES, _LEAST_PATCHES = 64, 2**14
# From this number of inputs on, sums are in the precision of their products; with a mean square of
# more than so many variances in double precision again.
_WIDE, _LARGE_MEAN = 1024, 100.0
_ROWS = 2048  # that are gathered at a time
_LARGE = 2**24  # bytes of a layer's sums from which on memory counts more than time


@dataclass
class Accumulator:
    """Sums up, in float64, a layer's input patches x, and optionally its outputs y for them.

    Products of a slice of patches are float32 (float64 for a float64 layer). The mean of the first
    slice is subtracted first: else rounding would hide the variance of inputs with a large mean.

    Wide layers are summed up in the precision of their products. Of the widest, only a sample of
    the patches is held, as a matrix would need more memory than its fits are worth.

    Of many more patches than `most`, the sums are estimated from a random sample: each call's share
    of it is the call's share of all patches until then, or of the `expected` ones if these are
    more. At least fan_in are taken.
    """

    spec: LayerSpec
    most: float = math.inf
    expected: int = 0
    seed: int = 0
    count: int = 0  # of all patches, those that were not taken included
    sizes: set[tuple[int, ...]] = field(default_factory=set)
    origin: Tensor | None = None  # (groups, 1, fan_in), subtracted from all patches in the sums
    total: Tensor | None = None  # (groups, fan_in)
    matrix: Tensor | None = None  # (groups, fan_in, fan_in), lower triangle
    rows: list[Tensor] = field(default_factory=list)
    # The sums of y xᵀ (groups, out / groups, fan_in) and y (groups, out / groups).
    output_sums: tuple[Tensor, ...] = ()

    def add(self, x: Tensor, outputs: Tensor | None = None) -> None:
        """Add the patches of one call, and the layer's outputs in it, in the layer's own layout."""
        with full_precision(x.device):  # this runs inside the model's forward pass, in any mode
            spec = self.spec
            self.sizes.add(tuple(x.shape[x.dim() - spec.ndim :]))
            x = wide(x)
            y = None if outputs is None else wide(outputs)
            present = count_patches(x, spec)
            self.count += present
            if self.rows and is_widest(spec):
                self._thin_out((self.count - present) / self.count)
            places = self._places(present)
            if places is None:
                slices, weight = patches(x, spec), 1.0
                targets = None if y is None else output_rows(y, spec)
            else:
                places, weight = places.to(x.device), present / len(places)
                x = channels_last(x, spec)
                slices = (patches_at(x, spec, some) for some in places.split(_ROWS))
                targets = None if y is None else patches_at(y, each_output(spec), places)[0]
            for rows in slices:
                if not rows.shape[1]:
                    continue
                if self.origin is None or self.total is None:
                    self.origin = rows.mean(dim=1, keepdim=True)
                    self.total = torch.zeros_like(self.origin[:, 0], dtype=torch.float64)
                centred = rows - self.origin
                self.total.add_(centred.sum(dim=1), alpha=weight)
                if targets is not None:
                    self._add_outputs(centred, targets[: rows.shape[1]], weight)
                    targets = targets[rows.shape[1] :]
                self._add_rows(rows, centred, self.origin, weight)

    def _places(self, present: int) -> Tensor | None:
        """The places of one call's patches that are taken; None for all of them."""
        least = self.spec.fan_in
        most = sample_size(self.spec) if is_widest(self.spec) else max(self.most, least)
        share = most / max(self.count, self.expected, 1)
        if share >= 1 or not present:
            return None
        return spread(present, math.ceil(share * present), self._generator)

    @cached_property
    def _generator(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def _thin_out(self, share: float) -> None:
        """Keep that share of a full sample, so that all patches are as likely to be in it."""
        held = torch.cat(self.rows, dim=1)
        most = math.ceil(share * sample_size(self.spec))
        self.rows = [held]
        if most < held.shape[1]:
            kept = spread(held.shape[1], most, self._generator).to(held.device)
            self.rows = [held.index_select(1, kept)]

    def _add_rows(self, rows: Tensor, centred: Tensor, origin: Tensor, weight: float) -> None:
        if self.count < self.spec.fan_in or is_widest(self.spec):
            self.rows.append(rows.clone())
            return
        if self.matrix is None:
            fan_in = self.spec.fan_in
            dtype = rows.dtype if fan_in >= _WIDE else torch.float64
            self.matrix = rows.new_zeros(self.spec.groups, fan_in, fan_in, dtype=dtype)
            if self.rows:
                _add_product(self.matrix, torch.cat(self.rows, dim=1) - origin)
                self.rows.clear()
        _add_product(self.matrix, centred, weight)

    def _add_outputs(self, rows: Tensor, targets: Tensor, weight: float) -> None:
        groups, out = self.spec.groups, self.spec.group_out
        targets = targets.unflatten(1, (groups, out)).transpose(0, 1)
        if not self.output_sums:
            cross = rows.new_zeros(groups, out, self.spec.fan_in, dtype=torch.float64)
            self.output_sums = cross, cross.new_zeros(groups, out)
        cross, total = self.output_sums
        cross.add_(targets.transpose(1, 2) @ rows, alpha=weight)
        total.add_(targets.sum(dim=1), alpha=weight)

    def copied(self) -> "Accumulator":
        """The same sums, which go on apart from these."""
        other = copy.copy(self)
        other.sizes, other.rows = {*self.sizes}, [*self.rows]
        other.total = None if self.total is None else self.total.clone()
        other.matrix = None if self.matrix is None else self.matrix.clone()
        other.output_sums = tuple(total.clone() for total in self.output_sums)
        other._generator = copy.deepcopy(self._generator)
        return other

    def sees_few(self, each: int) -> bool:
        """Whether there are fewer patches than so many for each entry of a patch."""
        return self.count < each * self.spec.fan_in

    @property
    def nbytes(self) -> int:
        held = (self.total, self.matrix, *self.rows, *self.output_sums)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def finish(self, gradient: Tensor | None = None) -> LayerMoments | None:
        """The moments, or None if the layer never ran. It can be called once."""
        if self.total is None or self.origin is None:
            return None
        matrix = rows = None
        origin = self.origin.double()[:, 0]  # (groups, fan_in)
        offset = self.total / self.count
        if self.matrix is not None:
            # In place, as this is the largest tensor.
            full = self.matrix.tril_()
            full += full.tril(-1).transpose(1, 2)
            full /= self.count
            half = (offset + origin / 2)[:, None]
            power = float(full.diagonal(dim1=1, dim2=2).sum())
            if float(half.square().sum()) > _LARGE_MEAN * power:  # it would hide the variance
                full = full.double()
            origin, half = origin.to(full.dtype), half.to(full.dtype)
            full.baddbmm_(origin[:, :, None], half)
            full.baddbmm_(half.transpose(1, 2), origin[:, None])
            matrix = to_kernel_order(full, self.spec, (1, 2))
        else:
            held = torch.cat(self.rows, dim=1)
            self.rows.clear()  # of the widest layers they are as large as all else together
            rows = to_kernel_order(held, self.spec, (2,))
        mean = to_kernel_order(self.origin.double()[:, 0] + offset, self.spec, (1,))
        sizes = tuple(sorted(self.sizes))
        return LayerMoments(self.spec, self.count, mean, matrix, rows, sizes, gradient)

    def mean_cross(self) -> tuple[Tensor, Tensor]:
        """``E[y xᵀ]`` (groups, out / groups, fan_in) and ``E[y]`` (groups, out / groups)."""
        assert self.origin is not None
        cross, mean = (total / self.count for total in self.output_sums)
        cross += mean[:, :, None] * self.origin.double()
        return to_kernel_order(cross, self.spec, (2,)), mean


def _add_product(matrix: Tensor, rows: Tensor, weight: float = 1.0) -> None:
    """Add each group's ``weight · rows.T @ rows`` to the lower triangle of its matrix."""
    fan_in = matrix.shape[1]
    width = max(_BLOCK, -(-fan_in // _BLOCKS))
    for total, group in zip(matrix, rows, strict=True):
        for start in range(0, fan_in, width):
            end = start + width
            product = group[:, start:].T @ group[:, start:end]
            total[start:, start:end].add_(product, alpha=weight)


def sums_bytes(spec: LayerSpec, known: int, dtype: torch.dtype) -> int:
    """The memory that the sums of a layer take, with so many patches; 0 where these are not known.

    `dtype` is that of the products.
    """
    if spec.lookup:
        return 8 * spec.in_channels
    rows = sample_size(spec) if is_widest(spec) else spec.fan_in
    each = dtype.itemsize
    if not is_widest(spec) and not 0 < known < spec.fan_in:
        each = dtype.itemsize if spec.fan_in >= _WIDE else 8
    elif known:
        rows = min(known, rows)
    return spec.groups * spec.fan_in * (8 + each * rows)


def is_large(spec: LayerSpec) -> bool:
    """Whether the sums of a layer are so large that memory is worth some time."""
    return sums_bytes(spec, 0, torch.float32) > _LARGE


def spread(present: int, taken: int, generator: np.random.Generator) -> Tensor:
    """Random ones of `present` places, one from each of `taken` stretches of the same length."""
    # NumPy's numbers, as this may run inside torch.vmap, which refuses to draw torch's.
    inside = np.arange(taken) + generator.random(taken)
    places = (inside * (present / taken)).astype(np.int64).clip(max=present - 1)
    return torch.from_numpy(places)


def enough(spec: LayerSpec) -> int:
    """The number of patches beyond which a fit of the layer hardly gains, or takes no more."""
    if is_widest(spec):
        return sample_size(spec)
    return max(_PATCHES * spec.fan_in, _LEAST_PATCHES)


def wide(x: Tensor) -> Tensor:
    """The values in at least float32, as sums take them."""
    return dense(x.detach()).to(torch.promote_types(x.dtype, torch.float32))
