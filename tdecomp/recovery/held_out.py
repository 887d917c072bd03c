"""The error of a whole model against the original, always on the same samples."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tdecomp.calibration.data import Batches
from tdecomp.model.batches import count_samples, device_of, tensors_of
from tdecomp.torch_state import no_fast_path, untouched

# The samples that the error is taken on: the first batches, until there are so many.
_SAMPLES = 256
# A variance below this share of the mean square is rounding.
_ROUNDING = 1e-12


class HeldOut:
    """Samples with the original's outputs for them, which errors of other models are taken on.

    The same samples each time: new ones, as from a DataLoader that shuffles, would change the
    error even of an unchanged model. The original runs once, when the first error is taken.

    Parameters
    ----------
    original : nn.Module
    batches : Batches
    vary : callable ``(batch) -> batch``, optional
        Changes each batch first, e.g. where the models are trained on these very samples.
    """

    def __init__(
        self, original: nn.Module, batches: Batches, vary: Callable[[Any], Any] | None = None
    ) -> None:
        self._original, self._batches, self._vary = original, batches, vary

    @cached_property
    def _calls(self) -> list[tuple[Any, list[Tensor]]]:
        """Each batch with the original's outputs for it."""
        calls: list[tuple[Any, list[Tensor]]] = []
        samples = 0
        with untouched(self._original), no_fast_path(), torch.no_grad():
            for given in self._batches.on(device_of(self._original)):
                batch = given if self._vary is None else self._vary(given)
                outputs = tensors_of(self._batches.run(self._original, batch))
                calls.append((batch, [y.clone() for y in outputs]))
                samples += count_samples(batch)
                if samples >= _SAMPLES:
                    break
        if not samples:
            raise ValueError("the batches hold no samples; expected at least one")
        return calls

    @cached_property
    def _variance(self) -> float:
        variance = _variance([outputs for _, outputs in self._calls])
        if not math.isfinite(variance):
            raise ValueError(
                "the original model's outputs for the batches hold NaN or infinities; expected "
                "finite ones. Look at the batches and at the model's weights"
            )
        return variance

    def error(self, model: nn.Module) -> float:
        """The share of the variance of the original's outputs that the model loses.

        Raises
        ------
        ValueError
            If the original's outputs hold no floating-point tensor or are not finite, or if the
            two models' outputs have different shapes.
        """
        variance = self._variance
        lost = 0.0
        with untouched(model), no_fast_path(), torch.no_grad():
            for batch, wanted in self._calls:
                mine = tensors_of(self._batches.run(model, batch))
                if [z.shape for z in mine] != [z.shape for z in wanted]:
                    raise ValueError(
                        f"the model's outputs have shapes {[tuple(z.shape) for z in mine]}, the "
                        f"original's {[tuple(z.shape) for z in wanted]}; expected the original of "
                        "this model"
                    )
                for z, y in zip(mine, wanted, strict=True):
                    lost += float((z.double() - y.double()).square().sum())
        return lost / variance if variance > 0 else float(lost > 0)


def _variance(outputs: Sequence[Sequence[Tensor]]) -> float:
    """Of all outputs of all batches, each entry about its own mean over the samples."""
    if not any(batch for batch in outputs):
        raise ValueError(
            "the original model's outputs hold no floating-point tensor, so that no error can be "
            "computed; forward=lambda model, batch: ... may return one"
        )
    power = centred = 0.0
    for calls in zip(*outputs, strict=False):
        rows = [y.double().reshape(len(y) if y.dim() else 1, -1) for y in calls]
        square = sum(float(r.square().sum()) for r in rows)
        power += square
        if len({r.shape[1] for r in rows}) == 1:  # else the entries have no mean in common
            total = sum((r.sum(dim=0) for r in rows), rows[0].new_zeros(rows[0].shape[1]))
            square -= float(total.square().sum()) / max(sum(len(r) for r in rows), 1)
        centred += square
    # A single sample has no variance: its mean square stands in for it.
    return centred if not centred <= _ROUNDING * power else power
