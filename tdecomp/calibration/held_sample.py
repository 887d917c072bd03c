"""Drawing the patches of held-out samples that are kept."""

import copy

import numpy as np
import torch
from torch import Tensor

from tdecomp.calibration.accumulator import spread
from tdecomp.calibration.counted_rows import CountedRows
from tdecomp.calibration.held_patches import HeldPatches
from tdecomp.layers.patches import count_patches, dense, patches_at, to_kernel_order
from tdecomp.layers.spec import LayerSpec

# The most patches that are kept of a layer, and the most numbers in them.
_PATCHES = 1024
_NUMBERS = 2**21


class HeldSample:
    """Draws patches from one batch after another; each has the same chance to be kept."""

    def __init__(self, spec: LayerSpec, seed: int) -> None:
        self._spec = spec
        numbers = 1 if spec.lookup else spec.groups * spec.fan_in  # that hold one
        self._most = max(1, min(_PATCHES, _NUMBERS // numbers))
        self._generator = np.random.default_rng(seed)
        self._share = 1.0
        self._kept: list[HeldPatches] = []

    def add(self, x: Tensor, counted: CountedRows, samples: range) -> None:
        """Draw from a layer's input, of a batch of the samples of these numbers."""
        spec = self._spec
        x, owners = counted.of_samples(dense(x.detach()), spec, samples)
        present = count_patches(x, spec)
        if not present:
            return
        if not self._kept:
            self._share = min(1.0, self._most / present)
        taken = max(1, round(self._share * present))
        places = spread(present, taken, self._generator)
        wide = x.long() if spec.lookup else x.to(torch.promote_types(x.dtype, torch.float32))
        rows = to_kernel_order(patches_at(wide, spec, places.to(x.device)), spec, (2,))
        each = present // len(owners)  # patches
        self._kept.append(HeldPatches(rows, owners[places // each].to(x.device)))
        while sum(len(kept.owners) for kept in self._kept) > self._most:
            self._share /= 2
            self._kept = [self._half(kept) for kept in self._kept]

    def _half(self, kept: HeldPatches) -> HeldPatches:
        count = len(kept.owners)
        chosen = torch.from_numpy(self._generator.permutation(count)[: (count + 1) // 2])
        chosen = chosen.to(kept.owners.device)
        return HeldPatches(kept.rows[:, chosen], kept.owners[chosen])

    def copied(self) -> "HeldSample":
        """The same sample, which is drawn on apart from this one."""
        other = copy.copy(self)
        other._generator, other._kept = copy.deepcopy(self._generator), [*self._kept]
        return other

    def finish(self) -> HeldPatches | None:
        """All that were kept; None if the layer never ran."""
        if not self._kept:
            return None
        rows = torch.cat([kept.rows for kept in self._kept], dim=1)
        return HeldPatches(rows, torch.cat([kept.owners for kept in self._kept]))
