"""How often a lookup reads each of its rows, over batches."""

import copy

import torch
from torch import Tensor

from tdecomp.calibration.layer_moments import LayerMoments
from tdecomp.layers.spec import LayerSpec


class RowCounts:
    """Counts the rows that a lookup reads: all that its one-hot inputs' second moment holds.

    It is used as an `Accumulator` is, without a matrix of all rows by all rows.
    """

    def __init__(self, spec: LayerSpec) -> None:
        self.spec, self.count = spec, 0
        self._counts: Tensor | None = None  # (rows,)

    def add(self, x: Tensor) -> None:
        """Add the numbers of the rows that one call reads."""
        rows = x.detach().reshape(-1).long()
        # Numbers that are out of range are the layer's own to refuse, a moment later.
        rows = rows[(rows >= 0) & (rows < self.spec.in_channels)]
        ones = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
        if self._counts is None:
            self._counts = ones.new_zeros(self.spec.in_channels)
        self._counts.index_add_(0, rows, ones)
        self.count += len(rows)

    def copied(self) -> "RowCounts":
        """The same counts, which go on apart from these."""
        other = copy.copy(self)
        other._counts = None if self._counts is None else self._counts.clone()
        return other

    def sees_few(self, each: int) -> bool:
        """Never: rows that no input names need no further inputs."""
        del each
        return False

    @property
    def nbytes(self) -> int:
        return 0 if self._counts is None else self._counts.nbytes

    def finish(self, gradient: Tensor | None = None) -> LayerMoments | None:
        """The moments, or None if no row was ever read."""
        if self._counts is None or not self.count:
            return None
        mean = (self._counts / self.count)[None]  # (1, rows)
        return LayerMoments(self.spec, self.count, mean, sizes=((),), gradient=gradient)
