"""What each layer sees: second moments of its input patches, and how much its outputs matter."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tdecomp.layer import LayerSpec
from tdecomp.linalg import undisturbed
from tdecomp.patches import patches, to_kernel_order
from tdecomp.regression import SecondMoment

# Columns of a symmetric product that are computed at a time; what is above the diagonal is not.
_BLOCK = 96
_BLOCKS = 4


@dataclass(frozen=True)
class LayerMoments:
    """What one layer saw.

    Attributes
    ----------
    spec : LayerSpec
    count : int
        Input patches; for a Linear, input vectors.
    mean : Tensor, shape (groups, fan_in), float64
    matrix : Tensor, shape (groups, fan_in, fan_in), float64, or None
        The second moment ``E[x xᵀ]``, not centred.
    rows : Tensor, shape (groups, count, fan_in), or None
        The patches themselves, while there are fewer of them than fan_in.
    sizes : tuple of tuple of int
        The spatial sizes of the inputs.
    gradient : Tensor, shape (out_channels, out_channels), float64, or None
        Second moment of the gradients at the layer's outputs, summed over positions.
    """

    spec: LayerSpec
    count: int
    mean: Tensor
    matrix: Tensor | None = None
    rows: Tensor | None = None
    sizes: tuple[tuple[int, ...], ...] = ()
    gradient: Tensor | None = None

    @property
    def few(self) -> bool:
        """Whether there are fewer samples than inputs to each output."""
        return self.count < self.spec.fan_in

    @property
    def nbytes(self) -> int:
        held = (self.mean, self.matrix, self.rows, self.gradient)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def second_moments(self, dtype: torch.dtype = torch.float64) -> list[SecondMoment]:
        """One for each group; about the mean where the layer has a bias that can take it up."""
        if self.matrix is not None:
            matrix = self.matrix
            if self.spec.bias:
                matrix = matrix - self.mean[:, :, None] * self.mean[:, None, :]
            return [SecondMoment(matrix=group.to(dtype)) for group in matrix]
        assert self.rows is not None
        rows = self.rows.to(dtype)
        if self.spec.bias:
            rows = rows - self.mean[:, None, :].to(dtype)
        return [SecondMoment(rows=group) for group in rows / max(self.count, 1) ** 0.5]

    def output_variance(
        self, weight: Tensor, second: Sequence[SecondMoment] | None = None
    ) -> float:
        """``E‖y − E y‖²`` of the layer's outputs with this weight; see `output_error`."""
        if second is None or not self.spec.bias:
            second = replace(self, spec=replace(self.spec, bias=True)).second_moments()
        return sum(m.lost(k) for m, k in zip(second, self.kernels(weight), strict=True))

    def output_error(
        self, weight: Tensor, approximation: Tensor, second: Sequence[SecondMoment] | None = None
    ) -> float:
        """The share of the outputs' variance that is lost, with the bias corrected for the mean.

        ``E‖(W − W̃) x‖² / E‖W x − E[W x]‖²``, both weights in the layer's own layout; `second`
        is what `second_moments` gave, where it is at hand.
        """
        second = self.second_moments() if second is None else second
        difference = self.kernels(weight.detach().double() - approximation.detach().double())
        lost = sum(m.lost(d) for m, d in zip(second, difference, strict=True))
        variance = self.output_variance(weight, second)
        return lost / variance if variance > 0 else float(lost > 0)

    def mean_output(self, weight: Tensor) -> Tensor:
        """``W E[x]`` (out_channels,), without the bias."""
        kernels = self.kernels(weight)
        return torch.cat([k @ mean for k, mean in zip(kernels, self.mean, strict=True)])

    def kernels(self, weight: Tensor) -> list[Tensor]:
        """Each group's kernel as a float64 matrix (out / groups, fan_in)."""
        return list(weight.detach().double().flatten(1).chunk(self.spec.groups))

    def gradient_blocks(self) -> list[Tensor] | None:
        """Each group's own block (out / groups, out / groups) of the gradient's second moment."""
        if self.gradient is None:
            return None
        size = self.spec.group_out
        places = range(0, self.spec.out_channels, size)
        return [self.gradient[at : at + size, at : at + size] for at in places]

    def merged(self, other: "LayerMoments", share: float) -> "LayerMoments":
        """Those of both sets of inputs; `share` is this one's part of all examples."""
        other = other.to(self.mean.device)
        count = self.count + other.count
        mine, matrix, rows, gradient = self.count / count, None, None, None
        if self.rows is not None and other.rows is not None and count < self.spec.fan_in:
            rows = torch.cat([self.rows, other.rows], dim=1)
        else:
            matrix = mine * self._as_matrix() + (1 - mine) * other._as_matrix()
        if self.gradient is not None and other.gradient is not None:
            gradient = share * self.gradient + (1 - share) * other.gradient
        mean = mine * self.mean + (1 - mine) * other.mean
        sizes = tuple(sorted({*self.sizes, *other.sizes}))
        return LayerMoments(self.spec, count, mean, matrix, rows, sizes, gradient)

    def _as_matrix(self) -> Tensor:
        if self.matrix is not None:
            return self.matrix
        assert self.rows is not None
        rows = self.rows.double()
        return rows.transpose(1, 2) @ rows / self.count

    def to(self, device: torch.device) -> "LayerMoments":
        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            mean=self.mean.to(device),
            matrix=moved(self.matrix),
            rows=moved(self.rows),
            gradient=moved(self.gradient),
        )


@dataclass
class Accumulator:
    """Sums up a layer's input patches, and optionally the outputs that belong to them.

    Sums are float64, products of a slice of patches float32 (float64 for a float64 layer). They
    are taken about the mean of the first slice: inputs of a large mean and a small variance would
    otherwise lose the variance in the products' rounding.
    """

    spec: LayerSpec
    with_outputs: bool = False
    count: int = 0
    sizes: set[tuple[int, ...]] = field(default_factory=set)
    origin: Tensor | None = None  # (groups, 1, fan_in), of which the sums below are differences
    total: Tensor | None = None  # (groups, fan_in)
    matrix: Tensor | None = None  # (groups, fan_in, fan_in), lower triangle
    rows: list[Tensor] = field(default_factory=list)
    cross: Tensor | None = None  # (groups, out / groups, fan_in)
    output_total: Tensor | None = None  # (groups, out / groups)
    output_power: float = 0.0

    def add(self, x: Tensor, outputs: Tensor | None = None) -> None:
        """Add the patches of one call, and the layer's outputs in it (as the layer gives them)."""
        with undisturbed(x.device):  # this runs inside the model's forward, whatever its mode
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
        if self.cross is None or self.output_total is None:
            shape = (self.spec.groups, self.spec.group_out, self.spec.fan_in)
            self.cross = torch.zeros(shape, dtype=torch.float64, device=rows.device)
            self.output_total = self.cross.new_zeros(shape[:2])
        self.cross += targets.transpose(1, 2) @ rows
        self.output_total += targets.sum(dim=1)
        self.output_power += float(targets.double().square().sum())

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
            # In place: this is the largest thing there is.
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

    def mean_cross(self) -> tuple[Tensor, Tensor, float]:
        """``E[y xᵀ]`` (groups, out / groups, fan_in), ``E[y]`` and ``E‖y‖²``."""
        assert self.cross is not None
        assert self.output_total is not None
        assert self.origin is not None
        mean = self.output_total / self.count
        cross = self.cross / self.count + mean[:, :, None] * self.origin.double()
        return to_kernel_order(cross, self.spec, (2,)), mean, self.output_power / self.count


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
