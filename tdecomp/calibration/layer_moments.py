"""The moments of one layer's inputs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tdecomp.layers.spec import LayerSpec
from tdecomp.linalg.second_moment import SecondMoment

# The fields of `LayerMoments` that are tensors.
TENSORS = ("mean", "matrix", "rows", "gradient")


@dataclass(frozen=True)
class LayerMoments:
    """Moments of the inputs that one layer saw, and of the gradients at its outputs."""

    spec: LayerSpec
    count: int  # of input patches; for a Linear, of input vectors
    mean: Tensor  # (groups, fan_in), float64
    # The second moment E[x xᵀ], not centred: (groups, fan_in, fan_in), float64.
    matrix: Tensor | None = None
    # The patches (groups, count, fan_in) instead, while there are fewer of them than fan_in.
    rows: Tensor | None = None
    sizes: tuple[tuple[int, ...], ...] = ()  # the spatial sizes of the inputs
    # The second moment of the gradients at the outputs, summed over positions: (out, out), float64.
    gradient: Tensor | None = None

    @property
    def few(self) -> bool:
        """Whether there are fewer patches than entries of a patch."""
        return self.count < self.spec.fan_in

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by the name of the field."""
        held = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def second_moments(self, dtype: torch.dtype = torch.float64) -> list[SecondMoment]:
        """One for each group; about the mean where the layer has a bias, which can correct it."""
        mean, bias = self.mean[:, None], self.spec.bias
        if self.rows is None:
            matrix = self._as_matrix() - mean.mT * mean if bias else self._as_matrix()
            return [SecondMoment(matrix=group.to(dtype)) for group in matrix]
        rows = self.rows.to(dtype) - mean.to(dtype) if bias else self.rows.to(dtype)
        return [SecondMoment(rows=group) for group in rows / max(self.count, 1) ** 0.5]

    def output_variance(
        self, weight: Tensor, second: Sequence[SecondMoment] | None = None
    ) -> float:
        """``E‖y − E y‖²`` of the layer's outputs with this weight."""
        if second is None or not self.spec.bias:
            second = replace(self, spec=replace(self.spec, bias=True)).second_moments()
        return sum(m.lost(k) for m, k in zip(second, self.kernels(weight), strict=True))

    def lost(
        self, weight: Tensor, difference: Tensor, second: Sequence[SecondMoment]
    ) -> tuple[float, float | None]:
        """The share ``E‖D x‖² / E‖W x − E[W x]‖²`` of the outputs' variance that is lost.

        D is a difference of weights in the layer's own layout, with the bias corrected for the
        mean. Also ``tr(H E[D x xᵀ Dᵀ])`` with H the gradients' second moment, None without.
        """
        kernels, blocks = self.kernels(difference), self.gradient_blocks()
        lost = sum(m.lost(d) for m, d in zip(second, kernels, strict=True))
        variance = self.output_variance(weight, second)
        share = lost / variance if variance > 0 else float(lost > 0)
        if blocks is None:
            return share, None
        groups = zip(blocks, second, kernels, strict=True)
        loss = sum(float((block * m.between(d)).sum()) for block, m, d in groups)
        return share, max(loss, 0.0)

    def output_error(self, weight: Tensor, approximation: Tensor) -> float:
        """The share of the outputs' variance that another weight in this one's place loses."""
        gone = weight.detach().double() - approximation.detach().double()
        return self.lost(weight, gone, self.second_moments())[0]

    def mean_output(self, weight: Tensor) -> Tensor:
        """``W E[x]`` (out_channels,), without the bias."""
        kernels = self.kernels(weight)
        return torch.cat([k @ mean for k, mean in zip(kernels, self.mean, strict=True)])

    def kernels(self, weight: Tensor) -> list[Tensor]:
        """Each group's kernel as a float64 matrix (out / groups, fan_in)."""
        kernel = self.spec.to_forward_layout(weight.detach().double())
        return list(kernel.flatten(1).chunk(self.spec.groups))

    def gradient_blocks(self) -> list[Tensor] | None:
        """Each group's own block (out / groups, out / groups) of the gradient's second moment."""
        if self.gradient is None:
            return None
        size = self.spec.group_out
        places = range(0, self.spec.out_channels, size)
        return [self.gradient[at : at + size, at : at + size] for at in places]

    def merged(self, other: "LayerMoments", share: float) -> "LayerMoments":
        """The moments of both sets of inputs; `share` is this one's share of all samples."""
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
        if self.rows is not None:
            rows = self.rows.double()
            return rows.mT @ rows / self.count
        assert self.matrix is not None
        return self.matrix

    def to(self, device: torch.device) -> "LayerMoments":
        moved: dict[str, Any] = {name: t.to(device) for name, t in self.tensors().items()}
        return replace(self, **moved)
