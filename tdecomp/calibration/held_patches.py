"""Random input patches of a layer, of samples that are held out, to tell the layer's error by."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tdecomp.calibration.estimate import Estimate, lost_share


@dataclass(frozen=True)
class HeldPatches:
    """Input patches of a layer, drawn at random from all of the samples that are held out."""

    rows: Tensor  # (groups, patches, fan_in)
    owners: Tensor  # (patches,), int64: the number of the sample that each is of

    def error(self, kernels: list[Tensor], gone: list[Tensor], shift: Tensor | None) -> Estimate:
        """The lost share of the output's variance with `gone` taken from the kernels.

        Both have a matrix (out / groups, fan_in) for each group; `shift` (out,) is what the bias
        makes up for.
        """
        rows = self.rows.double()
        outputs = torch.cat([x @ k.T for x, k in zip(rows, kernels, strict=True)], dim=1)
        lost = torch.cat([x @ k.T for x, k in zip(rows, gone, strict=True)], dim=1)
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
