"""Batch norm statistics taken anew on the decomposed model's own activations."""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tdecomp.batches import Batches, Forward, device_of
from tdecomp.recovery.base import Recovery, adopt, lost_output
from tdecomp.tracing import untouched


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
        As `tdecomp.calibrate`.
    """
    source = Batches(batches, "recalibrate_batchnorm", forward, max_batches)
    if original is not None:
        source.again("an error taken before and after")
    changed = copy.deepcopy(model)
    norms = [m for m in changed.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = float("nan") if original is None else lost_output(changed, original, source)
    momenta = [norm.momentum for norm in norms]
    with untouched(changed), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain average over the batches
            norm.train()
        for batch in source.bar(device_of(changed), "batch norm", progress):
            source.run(changed, batch)
        statistics = [{k: b.clone() for k, b in norm.named_buffers()} for norm in norms]
    with torch.no_grad():
        for norm, momentum, found in zip(norms, momenta, statistics, strict=True):
            norm.momentum = momentum
            for name, buffer in norm.named_buffers():
                buffer.copy_(found[name])
    after = float("nan") if original is None else lost_output(changed, original, source)
    if inplace:
        adopt(model, changed)
        changed = model
    notes = () if norms else ("the model has no batch norm that keeps statistics",)
    return Recovery(changed, "recalibrate_batchnorm", before, after, {}, notes)
