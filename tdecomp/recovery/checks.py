"""Some of a chain's inputs with the outputs that are wanted for them, to judge fits by."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tdecomp.calibration.accumulator import spread, wide
from tdecomp.layers.patches import count_patches, each_output, patches_at, to_kernel_order
from tdecomp.layers.spec import LayerSpec

# About so many patches are kept of each layer's, and so many numbers in them, but a few hundred.
_PATCHES, _NUMBERS, _LEAST = 2048, 2**22, 512


@dataclass
class Checks:
    """Rows of x and y, each with the number of its sample, at random places of each call."""

    spec: LayerSpec
    calls: int  # about so many are going to be added
    generator: np.random.Generator
    samples: int = 0
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def add(self, x: Tensor, y: Tensor, owners: Tensor, samples: int) -> None:
        """Add a call; `owners` are the numbers, below `samples`, of what each row of x is of."""
        spec, present = self.spec, count_patches(x, self.spec)
        wanted = max(_LEAST, min(_PATCHES, _NUMBERS // (spec.groups * spec.fan_in)))
        taken = min(present, math.ceil(wanted / max(self.calls, 1)))
        if taken:
            places = spread(present, taken, self.generator).to(x.device)
            rows = to_kernel_order(patches_at(wide(x), spec, places), spec, (2,))
            targets = patches_at(wide(y), each_output(spec), places)[0]
            targets = targets.unflatten(1, (spec.groups, -1)).transpose(0, 1)
            numbers = self.samples + owners.to(x.device)[places // (present // len(owners))]
            shares = torch.full_like(numbers, present / taken, dtype=torch.float64)
            self.parts.append((rows, targets, numbers, shares))
        self.samples += samples

    def weigh(self, roots: Sequence[Tensor]) -> None:
        """Join all calls, and multiply the wanted outputs by each group's R, if there is one."""
        if self.parts:
            rows, targets, *others = zip(*self.parts, strict=True)
            numbers, shares = map(torch.cat, others)
            y = torch.cat(targets, 1)
            if roots:
                y = torch.stack([g @ root.T.to(g) for g, root in zip(y, roots, strict=True)])
            self.parts = [(torch.cat(rows, 1), y, numbers, shares)]

    def errors(self, kernels: Sequence[Tensor], bias: Sequence[Tensor]) -> Tensor:
        """``Σ ‖R y − K x − b‖²`` (samples,) over each sample's positions, once they are weighed.

        Each group has a kernel (out / groups, fan_in) and a bias (out / groups,).
        """
        total = torch.zeros(self.samples, dtype=torch.float64, device=kernels[0].device)
        for x, y, owners, shares in self.parts:
            for rows, targets, kernel, shift in zip(x, y, kernels, bias, strict=True):
                gaps = targets - rows @ kernel.T.to(rows) - shift.to(rows)
                total.index_add_(0, owners, shares * gaps.square().sum(dim=1).double())
        return total

    def variance(self, mean: Sequence[Tensor]) -> float:
        """``Σ ‖R y − m‖²`` over all positions, with each group's mean of R y."""
        return sum(
            float((shares[:, None] * (targets - m.to(targets)).square()).sum())
            for _, y, _, shares in self.parts
            for targets, m in zip(y, mean, strict=True)
        )
