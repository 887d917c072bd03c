"""Summing up a layer's input patches, call by call."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdecomp.calibration.layer_moments import LayerMoments
from tdecomp.layers.patches import patches, to_kernel_order
from tdecomp.layers.spec import LayerSpec
from tdecomp.torch_state import undisturbed

# A symmetric product is computed in blocks of at least so many columns, and at most so many blocks,
# each from its diagonal downwards: the rest above the diagonal is not needed.
_BLOCK = 96
_BLOCKS = 4


@dataclass
class Accumulator:
    """Sums up a layer's input patches, and optionally the outputs for these patches.

    The sums are float64, the products of a slice of patches float32 (float64 for a float64 layer).
    The mean of the first slice is subtracted from all patches: otherwise rounding would hide the
    variance of inputs with a large mean.
    """

    spec: LayerSpec
    with_outputs: bool = False
    count: int = 0
    sizes: set[tuple[int, ...]] = field(default_factory=set)
    origin: Tensor | None = None  # (groups, 1, fan_in), subtracted from all patches in the sums
    total: Tensor | None = None  # (groups, fan_in)
    matrix: Tensor | None = None  # (groups, fan_in, fan_in), lower triangle
    rows: list[Tensor] = field(default_factory=list)
    cross: Tensor | None = None  # (groups, out / groups, fan_in)
    output_total: Tensor | None = None  # (groups, out / groups)
    output_matrix: Tensor | None = None  # (groups, out / groups, out / groups)

    def add(self, x: Tensor, outputs: Tensor | None = None) -> None:
        """Add the patches of one call, and the layer's outputs in it, in the layer's own layout."""
        with undisturbed(x.device):  # this runs inside the model's forward pass, in any mode
            self._add(x, outputs)

    def _add(self, x: Tensor, outputs: Tensor | None) -> None:
        spec, x = self.spec, _wide(x.detach())
        self.sizes.add(tuple(x.shape[x.dim() - spec.ndim :]))
        if self.total is None:
            self.total = torch.zeros(spec.groups, spec.fan_in, dtype=torch.float64, device=x.device)
        targets = None if outputs is None else _output_rows(_wide(outputs.detach()), spec)
        start = 0
        for rows in patches(x, spec):
            if self.origin is None and rows.shape[1]:
                self.origin = rows.mean(dim=1, keepdim=True)
            if self.origin is None:  # an empty slice
                continue
            centred = rows - self.origin
            self.total += centred.sum(dim=1)
            if targets is not None:
                self._add_cross(centred, targets[:, start : start + rows.shape[1]])
            start += rows.shape[1]
            self._add_rows(rows, centred)
        self.count += start

    def _add_rows(self, rows: Tensor, centred: Tensor) -> None:
        held = sum(chunk.shape[1] for chunk in self.rows)
        if self.matrix is None and held + rows.shape[1] < self.spec.fan_in:
            self.rows.append(rows.clone())
            return
        if self.matrix is None:
            size = (self.spec.groups, self.spec.fan_in, self.spec.fan_in)
            self.matrix = torch.zeros(size, dtype=torch.float64, device=rows.device)
            if self.rows:
                assert self.origin is not None
                self._add_product(torch.cat(self.rows, dim=1) - self.origin)
                self.rows.clear()
        self._add_product(centred)

    def _add_product(self, rows: Tensor) -> None:
        assert self.matrix is not None
        for total, group in zip(self.matrix, rows, strict=True):
            width = max(_BLOCK, -(-self.spec.fan_in // _BLOCKS))
            for start in range(0, self.spec.fan_in, width):
                block = group[:, start : start + width]
                total[start:, start : start + width] += group[:, start:].T @ block

    def _add_cross(self, rows: Tensor, targets: Tensor) -> None:
        if self.cross is None or self.output_total is None or self.output_matrix is None:
            shape = (self.spec.groups, self.spec.group_out, self.spec.fan_in)
            self.cross = torch.zeros(shape, dtype=torch.float64, device=rows.device)
            self.output_total = self.cross.new_zeros(shape[:2])
            self.output_matrix = self.cross.new_zeros(*shape[:2], shape[1])
        self.cross += targets.transpose(1, 2) @ rows
        self.output_total += targets.sum(dim=1)
        self.output_matrix += targets.transpose(1, 2) @ targets

    @property
    def nbytes(self) -> int:
        tensors = [t for t in (self.total, self.matrix, self.cross, *self.rows) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    def finish(self, gradient: Tensor | None = None) -> LayerMoments | None:
        """The moments, or None if the layer never ran."""
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
            full.baddbmm_(origin[:, :, None], half)
            full.baddbmm_(half.transpose(1, 2), origin[:, None])
            matrix = to_kernel_order(full, self.spec, (1, 2))
        else:
            rows = to_kernel_order(torch.cat(self.rows, dim=1), self.spec, (2,))
        return LayerMoments(
            self.spec,
            self.count,
            to_kernel_order(origin + offset, self.spec, (1,)),
            matrix,
            rows,
            tuple(sorted(self.sizes)),
            gradient,
        )

    def mean_cross(self) -> tuple[Tensor, Tensor, Tensor]:
        """``E[y xᵀ]`` (groups, out / groups, fan_in), ``E[y]`` and ``E[y yᵀ]``, by groups."""
        assert self.cross is not None
        assert self.output_total is not None
        assert self.output_matrix is not None
        assert self.origin is not None
        mean = self.output_total / self.count
        cross = self.cross / self.count + mean[:, :, None] * self.origin.double()
        return to_kernel_order(cross, self.spec, (2,)), mean, self.output_matrix / self.count


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def output_rows(y: Tensor, spec: LayerSpec) -> Tensor:
    """A layer's output as rows (positions, out_channels), in the order of `patches`."""
    if spec.ndim == 0:
        return y.reshape(-1, spec.out_channels)
    batch = y if y.dim() == spec.ndim + 2 else y[None]
    return batch.movedim(1, -1).reshape(-1, spec.out_channels)


def _output_rows(y: Tensor, spec: LayerSpec) -> Tensor:
    grouped: Tensor = output_rows(y, spec).unflatten(1, (spec.groups, spec.group_out))
    return grouped.transpose(0, 1)
