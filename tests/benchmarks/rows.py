"""Rows as a comparison would make them, without running it."""

from benchmarks.support.rows import ORIGINAL, Found, Row, Run

MADE_ON = {"cpu": "a processor", "torch_threads": "2", "torch": "2.13.0"}
BARE = Run("net", "own", "toys", ORIGINAL, val_images=8)


def row(method=ORIGINAL, share=1.0, quality=90.0, *, time=None, reason=None, high=None, **run):
    """A row whose measured shares are a little below those asked for."""
    there = None if method == ORIGINAL else 4
    time = share if time is None else time
    found = Found(
        layers=there, params=100, macs=1000, params_share=share, macs_share=0.98 * share,
        time_ms=5.0, time_share=time, time_low=time, time_high=high or time,
        measure="accuracy (%)", quality=quality, output_error=1 - quality / 100, seconds=1.5,
    )  # fmt: skip
    if reason is not None:
        found = Found(reason=reason)
    run = {"model": "net", "weights": "own", "data": "toys", "val_images": 8, **run}
    return Row(Run(method=method, share=share, **run), found, MADE_ON)
