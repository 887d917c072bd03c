"""What a table says of the data: none, or too little for some layers."""

import math
from collections.abc import Iterable, Sequence

from tdecomp.calibration.moments import Moments
from tdecomp.plans.row import Row

# Patches for each entry of a patch, with which fits are nearly those of any amount of data.
_ENOUGH = 4
# Weight errors below this are hardly felt in outputs, whatever the inputs.
_SMALL = 0.1
# The share of a layer's output, or of its squared weights, beyond which little is left of it.
_ALMOST_ALL = 0.9
_NAMED = 3
# What a note begins with that readers have to know before they look at the errors.
WARNING = "warning: "
_BY_WEIGHTS = (
    f"{WARNING}errors are of weights, outputs may lose more: "
    "data= (unlabelled inputs) fits to outputs"
)


def data_notes(rows: Iterable[Row], moments: Moments | None) -> tuple[str, ...]:
    """For the rows of a plan or of a report, fitted to these moments or, for None, to weights."""
    changed = [row for row in rows if row.method is not None]
    if not changed:
        return ()
    if moments is None:
        errors = [_weight_error(row) for row in changed]
        bounds = [r.weight_error is None and isinstance(r.rank, tuple) for r in changed]
        pairs = zip(errors, bounds, strict=True)
        lost = [None if error is None or bound else error**2 for error, bound in pairs]
        notes = [_BY_WEIGHTS] if any(error is None or error > _SMALL for error in errors) else []
        return (*notes, *_ruined(changed, lost, "weights"))
    notes = [
        f"{WARNING}nothing is held out: errors are of what was fitted to, those of other inputs "
        "are higher"
    ]
    if held := moments.held_out:
        notes = [
            f"errors are of {held:,} of {held + moments.samples:,} samples, held out from fits"
        ]
    few = []
    for row in changed:
        seen = moments.layers.get(row.name)
        if seen is None or seen.spec.lookup:  # which needs no more inputs than rows
            continue
        if seen.count < _ENOUGH * seen.spec.fan_in:
            few.append((_ENOUGH * seen.spec.fan_in / seen.count, row.name, seen))
    if few:
        times, name, seen = max(few, key=lambda one: one[0])
        notes.append(
            f"{WARNING}too little data for {len(few)} of {len(changed)} layers, least for "
            f"{name!r}: {seen.count:,} inputs of {seen.spec.fan_in:,} entries; "
            f"{math.ceil(times)} times as much would do"
        )
    shares = [r.expected_error if r.output_error is None else r.output_error for r in changed]
    return (*notes, *_ruined(changed, shares, "output"))


def _weight_error(row: Row) -> float | None:
    return row.expected_error if row.weight_error is None else row.weight_error


def _ruined(rows: Sequence[Row], lost: Sequence[float | None], what: str) -> tuple[str, ...]:
    """A warning of chains that have next to nothing of their layers."""
    pairs = zip(rows, lost, strict=True)
    names = [repr(row.name) for row, share in pairs if share is not None and share > _ALMOST_ALL]
    if not names:
        return ()
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (
        f"{WARNING}{len(names)} of {len(rows)} layers lose over {_ALMOST_ALL:.0%} of their {what} "
        f"({', '.join(names[:_NAMED])}{more}): take larger ranks, or leave them alone",
    )
