"""The rows that count, by the mask of the data."""

from typing import Any

import torch
from torch import Tensor

from tdecomp.calibration.passes import BatchError, Batches
from tdecomp.layers.spec import LayerSpec
from tdecomp.model.batches import describe


class CountedRows:
    """Selects the rows that count by the mask of the data, batch by batch."""

    def __init__(self, batches: Batches) -> None:
        self._caller, self._compute = batches.caller, batches.data.mask
        self._mask: Tensor | None = None
        self._shapes: set[tuple[int, ...]] = set()
        self._used = False

    def begin(self, batch: Any) -> None:
        """Take the mask of the next batch; BatchError if it fails or is no bool tensor."""
        if self._compute is None:
            return
        try:
            mask = self._compute(batch)
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
        return self._select(x, _leading(x, spec))

    def of_samples(self, x: Tensor, spec: LayerSpec, samples: range) -> tuple[Tensor, Tensor]:
        """The rows that count of a layer's input, and the number of the sample that each is of.

        All are of the first one if the input does not begin with a dimension for the samples.
        """
        mask = self._mask_of_rows(x, _leading(x, spec))
        length = len(x) if _leading(x, spec) else 1
        rows = torch.arange(length, device="cpu") if mask is None else mask.nonzero()[:, 0].cpu()
        each = length // len(samples) if length % len(samples) == 0 else length
        return x if mask is None else x[mask], samples.start + rows // each

    def of_output(self, z: Tensor) -> Tensor:
        """The rows that count of an output of the whole model."""
        return self._select(z, _before_features(z))

    def mask_of_output(self, z: Tensor) -> Tensor | None:
        """The mask of an output's rows, or None if all count."""
        return self._mask_of_rows(z, _before_features(z))

    def check_used(self) -> None:
        """Raise a ValueError if the mask fits no layer, or keeps none of the rows."""
        if self._compute is not None and not self._used:
            shapes = " or ".join(map(str, sorted(self._shapes)))
            raise ValueError(
                f"{self._caller}: the mask, of shape {shapes}, keeps no row of any layer's input; "
                "expected shape (batch,) or (batch, length), as the inputs of Linear layers begin, "
                "or (batch,) for convolutions, and True for the rows that count"
            )

    def _select(self, x: Tensor, leading: int) -> Tensor:
        """All rows, unless the mask has the shape of some of the first `leading` dimensions."""
        mask = self._mask_of_rows(x, leading)
        return x if mask is None else x[mask]

    def _mask_of_rows(self, x: Tensor, leading: int) -> Tensor | None:
        mask = self._mask
        if mask is None or mask.dim() > leading or x.shape[: mask.dim()] != mask.shape:
            return None
        self._used = self._used or bool(mask.any())
        return mask.to(x.device)


def _leading(x: Tensor, spec: LayerSpec) -> int:
    """How many dimensions of a layer's input or output a mask may have."""
    if spec.ndim:
        return int(x.dim() == spec.ndim + 2)
    features = int(x.is_floating_point())  # the numbers of rows that a lookup gets have none
    return x.dim() - features


def _before_features(z: Tensor) -> int:
    """How many dimensions of an output a mask may have: all but that of its features.

    An embedding (batch, features) may have as many of them as sequences have steps.
    """
    return max(z.dim() - 1, 1)
