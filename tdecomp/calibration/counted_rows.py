"""The rows that count, by the mask of the data."""

from typing import Any

import torch
from torch import Tensor

from tdecomp.calibration.data import BatchError, Batches
from tdecomp.layers.spec import LayerSpec
from tdecomp.model.batches import describe


class CountedRows:
    """Selects the rows that count by the mask of the data, batch by batch."""

    def __init__(self, batches: Batches) -> None:
        self._caller, self._mask_of = batches.caller, batches.data.mask
        self._mask: Tensor | None = None
        self._shapes: set[tuple[int, ...]] = set()
        self._used = False

    def begin(self, batch: Any) -> None:
        """Take the mask of the next batch; BatchError if it fails or is no bool tensor."""
        if self._mask_of is None:
            return
        try:
            mask = self._mask_of(batch)
        except Exception as error:
            words = f"the mask failed on a batch ({describe(batch)})"
            raise BatchError(f"{self._caller}: {words}: {error!r}") from error
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() == 0:
            raise BatchError(
                f"{self._caller}: the mask returned {describe(mask)}; expected a bool tensor of "
                "shape (batch,) or (batch, length), True for the rows that count"
            )
        self._mask = mask
        self._shapes.add(tuple(mask.shape))

    def of_layer(self, x: Tensor, spec: LayerSpec) -> Tensor:
        """The rows that count of a layer's input, of its output, or of a gradient there."""
        return self._select(x, int(x.dim() == spec.ndim + 2) if spec.ndim else x.dim() - 1)

    def of_output(self, z: Tensor) -> Tensor:
        """The rows that count of an output of the whole model."""
        return self._select(z, z.dim())

    def check_used(self) -> None:
        """Raise a ValueError if the mask fits no layer, or keeps none of the rows."""
        if self._mask_of is not None and not self._used:
            shapes = " or ".join(map(str, sorted(self._shapes)))
            raise ValueError(
                f"{self._caller}: the mask, of shape {shapes}, keeps no row of any layer's input; "
                "expected shape (batch,) or (batch, length), as the inputs of Linear layers begin, "
                "or (batch,) for convolutions, and True for the rows that count"
            )

    def _select(self, x: Tensor, leading: int) -> Tensor:
        """All rows, unless the mask has the shape of some of the first `leading` dimensions."""
        mask = self._mask
        if mask is None or mask.dim() > leading or x.shape[: mask.dim()] != mask.shape:
            return x
        self._used = self._used or bool(mask.any())
        return x[mask.to(x.device)]
