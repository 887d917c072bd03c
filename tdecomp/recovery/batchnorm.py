"""Batch norm statistics re-estimated on the decomposed model's own activations."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tdecomp.calibration.passes import BatchError, Batches
from tdecomp.model.batches import Forward, count_samples, device_of
from tdecomp.recovery.attempt import Attempt
from tdecomp.recovery.held_out import HeldOut
from tdecomp.recovery.recovery import Recovery, RecoveryStep, run_on_copy
from tdecomp.runtime.torch_state import evaluating, exact_passes


@dataclass(frozen=True)
class RecalibrateBatchnorm(RecoveryStep):
    """`recalibrate_batchnorm` as a step of `decompose`.

    >>> RecalibrateBatchnorm().name
    'recalibrate_batchnorm'
    """

    name: ClassVar[str] = "recalibrate_batchnorm"

    def run(
        self, model: nn.Module, original: nn.Module | None, batches: Batches, held_out: HeldOut
    ) -> Recovery:
        if original is not None:
            batches.require_several_passes("an error taken before and after")
        attempt = Attempt(model, held_out)
        norms = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        }
        statistics = _statistics(model, norms, batches)
        with torch.no_grad():
            for name, values in statistics.items():
                for buffer, value in zip(_buffers(norms[name]), values, strict=True):
                    buffer.copy_(value)
        notes = [f"{len(statistics)} batch norms"]
        if not norms:
            notes = ["the model has no batch norm that keeps statistics"]
        if missed := [name for name in norms if name not in statistics]:
            notes.append(f"no batch reached {', '.join(missed)}")
        return attempt.finish(self.name, notes=notes)


def recalibrate_batchnorm(
    model: nn.Module,
    batches: Any,
    *,
    original: nn.Module | None = None,
    forward: Forward | None = None,
    max_batches: int | None = None,
    inplace: bool = False,
    seed: int | None = None,
    progress: bool = True,
) -> Recovery:
    """Re-estimate the running mean and variance of every batch norm, without labels.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    >>> recovery = recalibrate_batchnorm(model, [torch.randn(32, 4) + 3], progress=False)
    >>> recovery.model[1].num_batches_tracked
    tensor(1)

    All batches have the same weight, as with ``momentum=None``. Only batch norms that keep
    statistics are put in training mode; dropout and all other layers stay in evaluation mode.

    Parameters
    ----------
    model, batches, forward, max_batches, seed, progress
        As for `tdecomp.calibrate`, and so are the errors raised.
    original : nn.Module, optional
        Needed for the errors before and after; without it both are NaN.
    inplace : bool
        Change `model` itself, wholly or, on an error, not at all.

    Returns
    -------
    Recovery
        With the model, and its error before and after.
    """
    return run_on_copy(
        RecalibrateBatchnorm(), model, original, batches, inplace, forward=forward,
        max_batches=max_batches, seed=seed, progress=progress,
    )  # fmt: skip


def _statistics(
    model: nn.Module, norms: Mapping[str, _BatchNorm], batches: Batches
) -> dict[str, list[Tensor]]:
    """The new buffers of each batch norm that a batch reaches; the model is left as it was."""
    momenta = {name: norm.momentum for name, norm in norms.items()}
    with evaluating(model), exact_passes(), torch.no_grad():
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # the plain average over the batches
            norm.train()
        for batch in batches.bar(device_of(model), "batch norm"):
            _run(model, batch, batches)
        statistics = {
            name: [value.clone() for value in _buffers(norm)]
            for name, norm in norms.items()
            if norm.num_batches_tracked is None or norm.num_batches_tracked > 0
        }
    for name, norm in norms.items():
        norm.momentum = momenta[name]
    for name, values in statistics.items():
        if not all(value.isfinite().all() for value in values):
            raise ValueError(
                f"recalibrate_batchnorm: layer {name!r}: its inputs hold NaN or infinities; "
                "expected finite activations. Look at the batches and at the layers before it"
            )
    return statistics


def _run(model: nn.Module, batch: Any, batches: Batches) -> None:
    try:
        batches.run(model, batch)
    except BatchError as error:
        if count_samples(batch) != 1:
            raise
        raise BatchError(
            "recalibrate_batchnorm: a batch of one sample may have no variance to estimate, got "
            f"one ({error.__cause__}); expected larger batches: drop_last=True in the DataLoader, "
            "or max_batches"
        ) from error


def _buffers(norm: _BatchNorm) -> list[Tensor]:
    return [value for value in norm._buffers.values() if value is not None]
