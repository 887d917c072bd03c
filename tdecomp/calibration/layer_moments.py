"""The moments of the inputs of one layer."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tdecomp.calibration.estimate import Estimate
from tdecomp.calibration.held_patches import HeldPatches
from tdecomp.calibration.precision import difference, precision_of, products
from tdecomp.layers.spec import LayerSpec
from tdecomp.linalg.second_moment import SecondMoment

TENSORS = ("mean", "matrix", "rows", "gradient")  # in LayerMoments
# Entries of a matrix above which a sample of the patches is held instead, and entries of that.
_LARGEST_MATRIX, _SAMPLE, _LEAST_SAMPLE = 2**25, 2**24, 1024
_COLUMNS = 2048  # of a lookup's kernel that are converted at a time


@dataclass(frozen=True)
class LayerMoments:
    """Moments of the inputs that one layer saw, and of the gradients at its outputs."""

    spec: LayerSpec
    count: int  # of input patches; for a Linear, of input vectors
    mean: Tensor  # (groups, fan_in), float64; of a lookup, how often each row is read
    matrix: Tensor | None = None  # E[x xᵀ], not centred: (groups, fan_in, fan_in)
    # The patches (groups, patches, fan_in) instead: all while there are fewer than fan_in, and a
    # random sample in the widest layers.
    rows: Tensor | None = None
    sizes: tuple[tuple[int, ...], ...] = ()  # the spatial sizes of the inputs
    gradient: Tensor | None = None  # E[g gᵀ], summed over positions: (out, out), float64
    held: HeldPatches | None = None  # of samples that are held out, in none of these moments
    samples: int | None = None  # independent of each other, as patches of one are not

    @property
    def few(self) -> bool:
        """Whether fewer patches are held than a patch has entries; a lookup needs no more."""
        return not self.spec.lookup and self.patches < self.spec.fan_in

    @property
    def patches(self) -> int:
        """The number of patches that the moments are made of, as far as single ones are held."""
        return self.count if self.rows is None else self.rows.shape[1]

    @property
    def sampled(self) -> bool:
        """Whether the rows are a sample of the patches."""
        return self.patches < self.count

    def __getstate__(self) -> dict[str, Any]:
        """The fields: what `single` keeps is computed again where it is needed."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by the name of the field."""
        named = {name: getattr(self, name) for name in TENSORS}
        if self.held is not None:
            named |= {"held_rows": self.held.rows, "held_owners": self.held.owners}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @cached_property
    def single(self) -> list[SecondMoment]:
        """`second_moments` in single precision, kept."""
        return self.second_moments(torch.float32)

    def second_moments(self, dtype: torch.dtype | None = None) -> list[SecondMoment]:
        """One for each group; about the mean where the layer has a bias, which can correct it.

        In double precision by default, a sample of the patches in its own.
        """
        mean, bias = self.mean[:, None], self.spec.bias
        if self.spec.lookup:
            return [SecondMoment(diagonal=self.mean[0].to(dtype or torch.float64))]
        if self.rows is None:
            matrix = self._as_matrix()
            if bias:  # subtracted in the precision that the matrix was found to need
                precise = torch.promote_types(matrix.dtype, dtype or torch.float64)
                about = mean.to(precise)
                matrix = matrix.to(precise, copy=True).baddbmm_(about.mT, about, alpha=-1)
            return [SecondMoment(matrix=group.to(dtype or torch.float64)) for group in matrix]
        dtype = dtype or (self.rows.dtype if self.sampled else torch.float64)
        rows = self.rows.to(dtype, copy=True)
        if bias:
            rows -= mean.to(dtype)
        rows /= max(rows.shape[1], 1) ** 0.5
        return [SecondMoment(rows=group) for group in rows]

    def shrunk(self, second: Sequence[SecondMoment]) -> Sequence[SecondMoment]:
        """`second_moments` as fits lean on them, which would follow the noise of few samples.

        They are those of one sample more, whose inputs vary alike in all directions: the posterior
        mean where the prior, an inverse Wishart distribution, weighs as much as one sample.
        """
        return [moment.shrunk(1 / self.samples) for moment in second] if self.samples else second

    def output_variance(
        self, weight: Tensor, second: Sequence[SecondMoment] | None = None
    ) -> float:
        """``E‖y − E y‖²`` of the layer's outputs with this weight."""
        if self.spec.lookup:
            (kernel,), about = self._kernels(weight), self.mean_output(weight)[:, None]
            parts = zip(kernel.split(_COLUMNS, 1), self.mean[0].split(_COLUMNS), strict=True)
            return sum(float(((k.double() - about).square() @ often).sum()) for k, often in parts)
        if second is None or not self.spec.bias:
            second = replace(self, spec=replace(self.spec, bias=True)).second_moments()
        kernels = self._kernels(weight)
        return sum(m.lost(k) for m, k in zip(second, kernels, strict=True))

    def lost(
        self, weight: Tensor, difference: Tensor, second: Sequence[SecondMoment]
    ) -> tuple[float, float | None]:
        """The share ``E‖D x‖² / E‖W x − E[W x]‖²`` of the outputs' variance that is lost.

        D is a difference of weights in the layer's own layout, with the bias corrected for the
        mean. Also ``tr(H E[D x xᵀ Dᵀ])`` with H the gradients' second moment, None without.
        """
        kernels = self._kernels(difference)
        lost = sum(m.lost(d) for m, d in zip(second, kernels, strict=True))
        variance = self.output_variance(weight, second)
        share = lost / variance if variance > 0 else float(lost > 0)
        loss = self.weighted_loss(difference, second)
        return share, None if loss is None else max(loss, 0.0)

    def weighted_loss(self, difference: Tensor, second: Sequence[SecondMoment]) -> float | None:
        """``tr(H E[D x xᵀ Dᵀ])`` with H the gradients' second moment; None without."""
        blocks = self.gradient_blocks()
        if blocks is None:
            return None
        groups = zip(blocks, second, self._kernels(difference), strict=True)
        return sum(m.weighted_loss(d, block) for block, m, d in groups)

    def output_error(self, weight: Tensor, approximation: Tensor) -> float:
        """The share of the outputs' variance that another weight in this one's place loses."""
        gone = difference(weight, approximation)
        return self.lost(weight, gone, self.second_moments())[0]

    def held_error(self, weight: Tensor, approximation: Tensor) -> Estimate | None:
        """`output_error` on samples that are held out, the bias corrected; None without any."""
        if self.held is None:
            return None
        gone = difference(weight, approximation)
        shift = self.mean_output(gone) if self.spec.bias else None
        return self.held.error(self._kernels(weight), self._kernels(gone), shift)

    def mean_output(self, weight: Tensor) -> Tensor:
        """``W E[x]`` (out_channels,), without the bias."""
        kernels = self._kernels(weight)
        return torch.cat([products(k, mean) for k, mean in zip(kernels, self.mean, strict=True)])

    def kernels(self, weight: Tensor) -> list[Tensor]:
        """Each group's kernel as a float64 matrix (out / groups, fan_in)."""
        return self._matrices(weight.detach().double())

    def _kernels(self, weight: Tensor) -> list[Tensor]:
        """`kernels`, which large layers keep in float32."""
        return self._matrices(weight.detach().to(precision_of(weight)))

    def _matrices(self, weight: Tensor) -> list[Tensor]:
        kernel = self.spec.to_forward_layout(weight)
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
        gradient = self.merged_gradient(other, share)
        return replace(self.merged_inputs(other), gradient=gradient)

    def merged_inputs(self, other: "LayerMoments") -> "LayerMoments":
        """`merged`, without gradients."""
        other = other.to(self.mean.device)
        count = self.count + other.count
        mine, matrix, rows = self.count / count, None, None
        if self.rows is not None and other.rows is not None and is_widest(self.spec):
            rows = _sample_of_both(self.rows, other.rows, mine)
        elif self.rows is not None and other.rows is not None and count < self.spec.fan_in:
            rows = torch.cat([self.rows, other.rows], dim=1)
        elif not self.spec.lookup:
            matrix = mine * self._as_matrix() + (1 - mine) * other._as_matrix()
        mean = mine * self.mean + (1 - mine) * other.mean
        sizes = tuple(sorted({*self.sizes, *other.sizes}))
        held = self.held or other.held
        if self.held is not None and other.held is not None:
            held = self.held.merged(other.held)
        samples = self.samples and other.samples and self.samples + other.samples
        return LayerMoments(self.spec, count, mean, matrix, rows, sizes, None, held, samples)

    def merged_gradient(self, other: "LayerMoments", share: float) -> Tensor | None:
        """That of both sets of inputs; `share` is this one's share of all samples."""
        if self.gradient is None or other.gradient is None:
            return None
        return share * self.gradient + (1 - share) * other.gradient.to(self.gradient.device)

    def of_inputs(self) -> tuple[int, ...]:
        """What says which tensors, but for gradients, it has: layers may share them."""
        return tuple(id(t) for name, t in self.tensors().items() if name != "gradient")

    def _as_matrix(self) -> Tensor:
        if self.rows is not None:
            rows = self.rows.double()
            return rows.mT @ rows / rows.shape[1]
        assert self.matrix is not None
        return self.matrix

    def to(self, device: torch.device) -> "LayerMoments":
        held = {name: getattr(self, name) for name in (*TENSORS, "held")}
        moved = {name: value.to(device) for name, value in held.items() if value is not None}
        return replace(self, **moved)


def is_widest(spec: LayerSpec) -> bool:
    """Whether a sample of the patches is held, as a matrix of moments would be too large."""
    return spec.fan_in**2 > _LARGEST_MATRIX


def sample_size(spec: LayerSpec) -> int:
    """The patches that are held of one of the widest layers."""
    return max(_SAMPLE // spec.fan_in, _LEAST_SAMPLE)


def _sample_of_both(mine: Tensor, others: Tensor, share: float) -> Tensor:
    """Rows of both samples in proportion."""
    most = min(mine.shape[1] / share, others.shape[1] / (1 - share))
    parts = []
    for rows, part in ((mine, share), (others, 1 - share)):
        places = torch.linspace(0, rows.shape[1] - 1, max(1, round(part * most))).long()
        parts.append(rows[:, places.to(rows.device)])
    return torch.cat(parts, dim=1)
