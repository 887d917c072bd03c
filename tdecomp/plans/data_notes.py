"""What a table says of the data: none, or too little for some layers."""

import math
from collections.abc import Iterable

from tdecomp.calibration.moments import Moments
from tdecomp.plans.row import Row

# Patches for each entry of a patch, with which fits are nearly those of any amount of data.
_ENOUGH = 4
# Weight errors below this are hardly felt in outputs, whatever the inputs.
_SMALL = 0.1
# What a note begins with that readers have to know before they look at the errors.
WARNING = "warning: "
_BY_WEIGHTS = (
    f"{WARNING}errors are of weights, outputs may lose more: "
    "data= (unlabelled inputs) fits to outputs"
)


def data_notes(rows: Iterable[Row], moments: Moments | None) -> tuple[str, ...]:
    """For the rows of a plan or of a report, fitted to these moments or, for None, to weights."""
    changed = [row for row in rows if row.method is not None]
    if moments is None:
        errors = [row.expected_error if row.weight_error is None else row.weight_error
                  for row in changed]  # fmt: skip
        if any(error is None or error > _SMALL for error in errors):
            return (_BY_WEIGHTS,)
        return ()
    if not changed:
        return ()
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
        if seen is not None and seen.count < _ENOUGH * seen.spec.fan_in:
            few.append((_ENOUGH * seen.spec.fan_in / seen.count, row.name, seen))
    if few:
        times, name, seen = max(few, key=lambda one: one[0])
        notes.append(
            f"{WARNING}too little data for {len(few)} of {len(changed)} layers, least for "
            f"{name!r}: {seen.count:,} inputs of {seen.spec.fan_in:,} entries; "
            f"{math.ceil(times)} times as much would do"
        )
    return tuple(notes)
