"""Random input patches of a layer, of samples that are held out, to tell the layer's error by."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tdecomp.calibration.estimate import Estimate, lost_share


@dataclass(frozen=True)
class HeldPatches:
    """Input patches of a layer, drawn at random from all of the samples that are held out."""

    rows: Tensor  # (groups, patches, fan_in); of a lookup, the numbers of the rows: (1, patches)
    owners: Tensor  # (patches,), int64: the number of the sample that each is of

    def error(self, kernels: list[Tensor], gone: list[Tensor], shift: Tensor | None) -> Estimate:
        """The lost share of the output's variance with `gone` taken from the kernels.

        Both have a matrix (out / groups, fan_in) for each group; `shift` (out,) is what the bias
        makes up for.
        """
        outputs, lost = (
            torch.cat([_product(x, k) for x, k in zip(self.rows, matrices, strict=True)], dim=1)
            for matrices in (kernels, gone)
        )
        lost = lost if shift is None else lost - shift
        count = len(outputs)
        centred = (outputs - outputs.mean(dim=0)) * (count / max(count - 1, 1)) ** 0.5
        return lost_share(self._by_sample(lost), self._by_sample(centred))

    def _by_sample(self, values: Tensor) -> Tensor:
        numbers, owners = self.owners.unique(return_inverse=True)
        sums = values.new_zeros(len(numbers))
        found: Tensor = sums.index_add_(0, owners, values.square().sum(dim=1))
        return found

    def merged(self, other: "HeldPatches") -> "HeldPatches":
        """Those of other samples as well."""
        owners = torch.cat([self.owners, other.owners + self.owners.max() + 1])
        return HeldPatches(torch.cat([self.rows, other.rows], dim=1), owners)

    def to(self, device: torch.device) -> "HeldPatches":
        return HeldPatches(self.rows.to(device), self.owners.to(device))


def _product(rows: Tensor, kernel: Tensor) -> Tensor:
    """The outputs (patches, out) of a kernel (out, fan_in) for some patches, or looked-up rows."""
    looked_up = rows.dim() == 1
    outputs = kernel.T.index_select(0, rows) if looked_up else rows.to(kernel.dtype) @ kernel.T
    return outputs.double()
