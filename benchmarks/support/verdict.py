"""Which method to use on this machine, in one line."""

from collections.abc import Sequence

from benchmarks.support.rows import ORIGINAL, Row
from benchmarks.support.summary import curve_in_words, lines_of, stage_in_words

# Of the most accurate network's quality, so much may be given up for speed.
_SHARE = 0.02
# Of the original's, so much that nobody would use what lost it.
_RUINED = 0.2


def verdict(rows: Sequence[Row]) -> str:
    """The fastest network that is about as good as the best, unless the original is faster.

    Without a measured quality, the fastest of all.
    """
    lines = [x for x in lines_of(rows) if x.run.method != ORIGINAL and x.values("time_share")]
    if not lines:
        return "nothing was timed, so that nothing can be said about this machine"
    measure, kept = "", [row.found.quality for row in rows if row.run.method == ORIGINAL]
    original = max((quality for quality in kept if quality is not None), default=None)
    if any(line.values("quality") for line in lines):
        lines = [line for line in lines if line.values("quality")]
        best = max(line.mean("quality") for line in lines)
        measure = str(lines[0].rows[0].found.measure)
        if original is not None and best < original - _RUINED * abs(original):
            return (
                f"none is of use: {measure} {best:.2f} at best, the original's {original:.2f}; "
                "larger shares, data, recovery and fine-tuning keep more"
            )
        lines = [x for x in lines if x.mean("quality") >= best - _SHARE * abs(best)]
    fastest = min(lines, key=lambda line: line.mean("time_share"))
    words = (
        f"{curve_in_words(fastest.curve)} at {fastest.run.share:g}, "
        f"{stage_in_words(fastest.run.stage)}: {fastest.mean('time_share'):.2f} of the original's "
        f"time at {fastest.mean('macs_share'):.2f} of its MACs"
    )
    if measure:
        words += f", {measure} {fastest.mean('quality'):.2f}"
        words += "" if original is None else f" (the original's {original:.2f})"
    if fastest.mean("time_high") >= 1:
        return f"on this machine none is measurably faster than the original (nearest: {words})"
    return f"on this machine use {words}"
