"""Which method to use on this machine, in one line."""

from collections.abc import Sequence

from benchmarks.support.comparison import ORIGINAL, Measurement

# Points of accuracy that a faster network may be behind the most accurate of the smaller ones.
_POINTS = 0.02


def verdict(measurements: Sequence[Measurement]) -> str:
    """The fastest line that is about as accurate as the best, unless the original is faster.

    Without accuracies, the fastest of all.
    """
    lines = [m for m in measurements if m.label != ORIGINAL and m.latency is not None]
    best = max((m.accuracy_before or 0.0 for m in lines), default=0.0)
    close = [m for m in lines if (m.accuracy_before or 0.0) >= best - _POINTS]
    if not close:
        return "nothing was timed, so that nothing can be said about this machine"
    fastest = min(close, key=lambda m: _ratio(m)[0])
    ratio, high = _ratio(fastest)
    words = f"{fastest.title} at {fastest.rank}: {ratio:.2f} of the original's time at "
    words += f"{fastest.macs_ratio:.2f} of its MACs"
    if fastest.accuracy_before is not None:
        words += f", accuracy {fastest.accuracy_before:.2%}"
    if high >= 1:
        return f"on this machine none is measurably faster than the original (nearest: {words})"
    return f"on this machine use {words}"


def _ratio(measurement: Measurement) -> tuple[float, float]:
    assert measurement.latency is not None
    return measurement.latency.ratio, measurement.latency.ratio_quartiles[1]
