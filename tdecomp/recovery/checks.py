"""Some of a chain's inputs with the outputs that are wanted for them, to judge fits by."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdecomp.calibration.accumulator import each_output, spread, wide
from tdecomp.calibration.counted_rows import CountedRows
from tdecomp.layers.patches import patches_at, to_kernel_order
from tdecomp.layers.spec import LayerSpec

# About so many patches are kept of each layer's.
_PATCHES = 2048


@dataclass
class Checks:
    """Rows of x and y, each with the number of its sample, at random places of each call."""

    spec: LayerSpec
    calls: int  # about so many are going to be added
    generator: torch.Generator
    samples: int = 0
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def add(self, x: Tensor, y: Tensor, owners: Tensor, samples: int) -> None:
        """Add a call; `owners` are the numbers of its patches' samples, below `samples`."""
        spec, present = self.spec, len(owners)
        taken = min(present, math.ceil(_PATCHES / max(self.calls, 1)))
        if taken:
            places = spread(present, taken, self.generator).to(x.device)
            rows = to_kernel_order(patches_at(wide(x), spec, places), spec, (2,))
            targets = patches_at(wide(y), each_output(spec), places)[0]
            targets = targets.unflatten(1, (spec.groups, -1)).transpose(0, 1)
            numbers = self.samples + owners[places]
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


def owners_of(x: Tensor, spec: LayerSpec, samples: int, rows: CountedRows) -> Tensor:
    """The number of the sample that each patch of a layer's input, of those that count, is of."""
    # A layer may see several parts of a sample, one after the other.
    parts = len(x) // samples if len(x) % samples == 0 else 1
    numbers = (torch.arange(len(x), device=x.device) // parts).clamp_max(samples - 1)
    one = x[..., :1] if spec.ndim == 0 else x[:, :1]
    numbers = numbers.reshape(-1, *[1] * (x.dim() - 1)).expand(one.shape)
    kept = rows.of_layer(numbers, spec)
    if spec.ndim == 0:
        return kept.reshape(-1)
    positions = math.prod(spec.output_size(tuple(x.shape[2:])))
    return kept.flatten(1)[:, :1].expand(-1, positions).reshape(-1)
