"""Opening a model's modules for a call of a public function, as its inputs show them in use."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from tdecomp.calibration.moments import Moments
from tdecomp.calibration.passes import Batches
from tdecomp.model.batches import copied, device_of, moved
from tdecomp.model.example import Example
from tdecomp.model.opened.scope import opened


def opened_for(
    model: nn.Module,
    example: Example | None = None,
    data: Batches | Moments | None = None,
    names: Collection[str] = (),
) -> opened:
    """`opened`, watched in one call of the example, or of the first batch where this is at hand.

    `names` are those of a plan's rows or of another model's modules.
    """
    runs: list[Callable[[nn.Module], Any]] = []
    if example is not None:
        runs.append(lambda model: example.copied().run(model))
    elif isinstance(data, Batches):
        first = _first(data.data.batches)
        runs += [] if first is None else [partial(_run, data, first)]
    known = {*names, *(data.layers if isinstance(data, Moments) else ())}
    return opened(model, runs, known or None)


def _first(batches: Any) -> Any:
    """The first batch, where looking at it takes none away and draws no random numbers."""
    if isinstance(batches, (Tensor, Mapping)):
        return batches
    return batches[0] if isinstance(batches, (list, tuple)) and batches else None


def _run(batches: Batches, batch: Any, model: nn.Module) -> Any:
    return batches.forward(model, copied(moved(batch, device_of(model))))
