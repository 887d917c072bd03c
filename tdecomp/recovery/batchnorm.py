"""Batch norm statistics taken anew on the decomposed model's own activations."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tdecomp.model.batches import Forward, device_of
from tdecomp.recovery.base import Recovery, Yardstick, adopt, batches_for, copy_of
from tdecomp.torch_state import untouched


def recalibrate_batchnorm(
    model: nn.Module,
    batches: Any,
    *,
    original: nn.Module | None = None,
    forward: Forward | None = None,
    max_batches: int | None = None,
    inplace: bool = False,
    progress: bool = True,
) -> Recovery:
    """Re-estimate the running mean and variance of every batch norm, without labels.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    >>> recovery = recalibrate_batchnorm(model, [torch.randn(32, 4) + 3], progress=False)
    >>> recovery.model[1].num_batches_tracked
    tensor(1)

    All batches count the same, as with ``momentum=None``. Only batch norms that keep statistics
    are put in training mode, so that dropout and the rest stay as in evaluation.

    Parameters
    ----------
    model : nn.Module
    batches : iterable of batches
        As for `tdecomp.calibrate`.
    original : nn.Module, optional
        To say what it did to the error; without it both errors are NaN.
    forward, max_batches
        As for `tdecomp.calibrate`.
    inplace : bool
        Change `model` itself, wholly or, on an error, not at all.
    progress : bool
        Show a bar over the batches.

    Returns
    -------
    Recovery

    Raises
    ------
    ValueError
        For NaN or infinities in a batch norm's inputs, and as `tdecomp.calibrate`.
    """
    source = batches_for("recalibrate_batchnorm", batches, forward, max_batches)
    yardstick = None
    if original is not None:
        source.again("an error taken before and after")
        yardstick = Yardstick(original, source)
    changed = copy_of(model)
    norms = {
        name: module
        for name, module in changed.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    before = math.nan if yardstick is None else yardstick.lost_by(changed)
    momenta = {name: norm.momentum for name, norm in norms.items()}
    with untouched(changed), torch.no_grad():
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # the plain average over the batches
            norm.train()
        for batch in source.bar(device_of(changed), "batch norm", progress):
            source.run(changed, batch)
        # Those that no batch reached keep what they have.
        statistics = {
            name: [value.clone() for value in norm._buffers.values() if value is not None]
            for name, norm in norms.items()
            if norm.num_batches_tracked is None or norm.num_batches_tracked > 0
        }
    _check_finite(statistics)
    with torch.no_grad():
        for name, norm in norms.items():
            norm.momentum = momenta[name]
            held = [value for value in norm._buffers.values() if value is not None]
            for buffer, value in zip(held, statistics.get(name, held), strict=True):
                buffer.copy_(value)
    after = math.nan if yardstick is None else yardstick.lost_by(changed)
    changed = adopt(model, changed) if inplace else changed
    return Recovery(changed, "recalibrate_batchnorm", before, after, {}, _notes(norms, statistics))


def _check_finite(statistics: Mapping[str, Sequence[Tensor]]) -> None:
    for name, values in statistics.items():
        if not all(bool(torch.isfinite(value).all()) for value in values):
            raise ValueError(
                f"recalibrate_batchnorm: layer {name!r}: its inputs hold NaN or infinities; "
                "expected finite activations. Look at the batches and at the layers before it"
            )


def _notes(norms: Collection[str], reached: Collection[str]) -> tuple[str, ...]:
    if not norms:
        return ("the model has no batch norm that keeps statistics",)
    missed = [name for name in norms if name not in reached]
    words = f"{len(norms) - len(missed)} batch norms"
    return (words, f"no batch reached {', '.join(missed)}") if missed else (words,)
