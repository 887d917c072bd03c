"""The error of a whole model against the original, always on the same samples."""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tdecomp.calibration.data import Batches
from tdecomp.model.batches import copied, count_samples, device_of, tensors_of
from tdecomp.torch_state import evaluating, exact_passes

# The error is taken on the first batches that hold at least this many samples together.
_SAMPLES = 256
# A variance below this share of the mean square is rounding.
_ROUNDING = 1e-12


class HeldOut:
    """Samples with the original's outputs for them, on which errors of other models are taken.

    The samples are kept: new ones, as from a DataLoader that shuffles, would change the error even
    of an unchanged model. The original runs once, when the first error is taken; without one, all
    errors are NaN. `vary` changes each batch first, for models trained on these very samples.
    """

    def __init__(
        self, original: Any, batches: Batches, vary: Callable[[Any], Any] | None = None
    ) -> None:
        self._original, self._batches, self._vary = original, batches, vary

    def error(self, model: nn.Module) -> float:
        """The share of the variance of the original's outputs that the model loses."""
        if self._original is None:
            return math.nan
        variance, lost = self._variance, 0.0
        with evaluating(model), exact_passes(), torch.no_grad():
            for batch, wanted in self._calls:
                mine = tensors_of(self._batches.run(model, batch))
                if [z.shape for z in mine] != [z.shape for z in wanted]:
                    raise ValueError(
                        f"the model's outputs have shapes {[tuple(z.shape) for z in mine]}, the "
                        f"original's {[tuple(z.shape) for z in wanted]}; expected the original of "
                        "this model"
                    )
                lost += squared_distance(mine, wanted)
        return lost / variance if variance > 0 else float(lost > 0)

    @cached_property
    def _calls(self) -> list[tuple[Any, list[Tensor]]]:
        """Each batch with the original's outputs for it."""
        calls: list[tuple[Any, list[Tensor]]] = []
        samples = 0
        with evaluating(self._original), exact_passes(), torch.no_grad():
            for given in self._batches.held_out_on(device_of(self._original)):
                # Kept in a copy: a loader may fill the same tensors again for the next batch.
                batch = copied(given if self._vary is None else self._vary(given))
                outputs = tensors_of(self._batches.run(self._original, batch))
                calls.append((batch, [y.clone() for y in outputs]))
                samples += count_samples(batch)
                if samples >= _SAMPLES:
                    break
        return calls

    @cached_property
    def _variance(self) -> float:
        """The variance of all outputs together, each entry about its own mean over the samples."""
        outputs = [wanted for _, wanted in self._calls]
        if not any(outputs):
            raise ValueError(
                "the original model's outputs hold no floating-point tensor, so that no error can "
                "be computed; forward=lambda model, batch: ... may return one"
            )
        power = centred = 0.0
        for calls in zip(*outputs, strict=False):
            rows = [y.double().reshape(len(y) if y.dim() else 1, -1) for y in calls]
            square = sum(float(r.square().sum()) for r in rows)
            power += square
            if len({r.shape[1] for r in rows}) == 1:  # else the entries have no mean in common
                total = torch.stack([r.sum(dim=0) for r in rows]).sum(dim=0)
                square -= float(total.square().sum()) / max(sum(map(len, rows)), 1)
            centred += square
        # A single sample has no variance: its mean square is used instead.
        variance = power if centred <= _ROUNDING * power else centred
        if not math.isfinite(variance):
            raise ValueError(
                "the original model's outputs for the batches hold NaN or infinities; expected "
                "finite ones. Look at the batches and at the model's weights"
            )
        return variance


def squared_distance(a: list[Tensor], b: list[Tensor]) -> float:
    """The sum over all entries of all tensors."""
    return sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True))
