"""The error of a whole model against the original, always on the same samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tdecomp.calibration.counted_rows import CountedRows
from tdecomp.calibration.estimate import Estimate, lost_share
from tdecomp.calibration.passes import Batches
from tdecomp.model.batches import copied, count_samples, device_of, tensors_of
from tdecomp.runtime.torch_state import evaluating, exact_passes

# The error is taken on the first batches that hold at least this many samples together.
_SAMPLES = 512
# A variance below this share of the mean square is rounding.
_ROUNDING = 1e-12


class HeldOut:
    """Samples that nothing is fitted to, with the original's outputs, to tell models' errors by.

    They are all samples where none are held out. They are kept: new ones, as from a DataLoader that
    shuffles, would change the error even of an unchanged model. The original runs once, when the
    first error is taken; without one, all errors are NaN.
    """

    def __init__(self, original: Any, batches: Batches) -> None:
        self._original, self._batches = original, batches

    def error(self, model: nn.Module) -> float:
        """The share of the variance of the original's outputs that the model loses."""
        return self.estimate(self.lost(model)).value

    def lost(self, model: nn.Module) -> Tensor:
        """Each sample's squared distance (samples,) between the model's and the original's outputs.

        The samples of a batch count as one where the outputs do not tell them apart.
        """
        if not self.tells:
            return torch.full((1,), math.nan, device="cpu")
        lost = []
        with evaluating(model), exact_passes(), torch.no_grad():
            for call in self._calls:
                mine, wanted = tensors_of(self._batches.run(model, call.batch)), call.outputs
                if [z.shape for z in mine] != [z.shape for z in wanted]:
                    raise ValueError(
                        f"the model's outputs have shapes {[tuple(z.shape) for z in mine]}, the "
                        f"original's {[tuple(z.shape) for z in wanted]}; expected the original of "
                        "this model"
                    )
                pairs = zip(call.rows(mine), call.rows(wanted), strict=True)
                lost.append(call.by_sample([x - y for x, y in pairs]))
        return torch.cat(lost)

    def estimate(self, lost: Tensor) -> Estimate:
        """The error for what `lost` returned, with its standard error if samples are held out."""
        if not self.tells:
            return Estimate(math.nan)
        found = lost_share(lost, self._variance)
        return found if self.samples else Estimate(found.value)

    @property
    def tells(self) -> bool:
        """Whether there is an original, so that errors are known."""
        return self._original is not None

    @property
    def samples(self) -> int:
        """The number of samples that are held out."""
        return len(self._variance) if self.tells and self._batches.holds_out else 0

    @property
    def steady(self) -> bool:
        """Whether the same samples are held out in each pass."""
        return self._batches.seen.steady

    @cached_property
    def _calls(self) -> list["_Call"]:
        """Each batch with the original's outputs for it."""
        calls: list[_Call] = []
        counted, samples = CountedRows(self._batches), 0
        with evaluating(self._original), exact_passes(), torch.no_grad():
            for given in self._batches.held_out_on(device_of(self._original)):
                # Kept in a copy: a loader may fill the same tensors again for the next batch.
                batch = copied(given)
                counted.begin(batch)
                outputs = [y.clone() for y in tensors_of(self._batches.run(self._original, batch))]
                masks = [counted.mask_of_output(y) for y in outputs]
                calls.append(_Call(batch, count_samples(batch), outputs, masks))
                samples += count_samples(batch)
                if samples >= _SAMPLES:
                    break
        return calls

    @cached_property
    def _variance(self) -> Tensor:
        """Each sample's part (samples,) of the outputs' variance, each entry about its own mean."""
        if not any(call.outputs for call in self._calls):
            raise ValueError(
                "the original model's outputs hold no floating-point tensor, so that no error can "
                "be computed; forward=lambda model, batch: ... may return one"
            )
        rows = [call.rows(call.outputs) for call in self._calls]
        unbiased = self._batches.holds_out  # else the variance of these very samples is meant
        centred = [_centred(calls, unbiased) for calls in zip(*rows, strict=False)]
        by_call = list(zip(self._calls, zip(*centred, strict=True), strict=True))
        variance = torch.cat([call.by_sample(values) for call, values in by_call])
        powers = [c.by_sample(y) for c, y in zip(self._calls, rows, strict=True)]
        power = torch.cat(powers)
        if not math.isfinite(float(power.sum())):
            raise ValueError(
                "the original model's outputs for the batches hold NaN or infinities; expected "
                "finite ones. Look at the batches and at the model's weights"
            )
        # A single sample has no variance: its mean square is used instead.
        return power if float(variance.sum()) <= _ROUNDING * float(power.sum()) else variance


@dataclass(frozen=True)
class _Call:
    """A batch, and what the original makes of it."""

    batch: Any
    samples: int
    outputs: list[Tensor]
    masks: list[Tensor | None]  # of each output, the rows that count

    def rows(self, outputs: list[Tensor]) -> list[Tensor]:
        """The rows (rows, entries) that count of each output: samples, or steps of sequences."""
        return [_rows(y, mask).double() for y, mask in zip(outputs, self.masks, strict=True)]

    def by_sample(self, rows: Sequence[Tensor]) -> Tensor:
        """The sum of squares (samples,) for each sample that has rows that count."""
        alone = all(y.dim() and len(y) == self.samples for y in self.outputs)
        samples = self.samples if alone else 1
        sums = torch.zeros(samples, dtype=torch.float64, device="cpu")
        counts = sums.clone()
        for mine, mask in zip(rows, self.masks, strict=True):
            owners = torch.arange(len(mine), device="cpu") if mask is None else mask.nonzero()[:, 0]
            owners = (
                owners.cpu() if alone else torch.zeros(len(mine), dtype=torch.int64, device="cpu")
            )
            squares = mine.square().sum(dim=1).cpu()
            sums.index_add_(0, owners, squares)
            counts.index_add_(0, owners, torch.ones_like(squares))
        found: Tensor = sums[counts > 0]
        return found


def _rows(y: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        return y[mask].reshape(-1, math.prod(y.shape[mask.dim() :]))
    return y.reshape(len(y) if y.dim() else 1, -1)


def _centred(calls: tuple[Tensor, ...], unbiased: bool) -> list[Tensor]:
    """The rows of each call about their mean, scaled if the mean shall not bias their squares."""
    count = sum(map(len, calls))
    if len({rows.shape[1] for rows in calls}) > 1:  # their entries have no mean in common
        return list(calls)
    mean = torch.stack([rows.sum(dim=0) for rows in calls]).sum(dim=0) / max(count, 1)
    scale = (count / (count - 1)) ** 0.5 if unbiased and count > 1 else 1.0
    return [(rows - mean) * scale for rows in calls]
