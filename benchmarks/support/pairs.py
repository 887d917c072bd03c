"""Our implementation and a plain one of the same thing, interleaved so that noise affects both."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HEADERS = ("what", "weights", "s", "s, plain", "times faster", "bound", "found", "plain",
           "error ratio", "bound", "peak GB")  # fmt: skip


@dataclass(frozen=True)
class Sides:
    """One way timed beside the plain one: seconds run by run, and what each found."""

    ours: tuple[float, ...]
    plain: tuple[float, ...]
    found: Any
    found_plainly: Any

    @property
    def times_faster(self) -> tuple[float, ...]:
        """Run by run."""
        return tuple(b / a for a, b in zip(self.ours, self.plain, strict=True))


def in_turns(
    ways: Mapping[str, Callable[[], Any]], plain: Callable[[], Any], repeats: int
) -> dict[str, Sides]:
    """Each way and the plain one, `repeats` times, the first one last in every other round."""
    everything = [*ways.values(), plain]
    seconds: list[list[float]] = [[] for _ in everything]
    found: list[Any] = [None] * len(everything)
    for turn in range(repeats):
        order = range(len(everything))
        for i in order if turn % 2 == 0 else reversed(order):
            start = time.perf_counter()
            found[i] = everything[i]()
            seconds[i].append(time.perf_counter() - start)
    return {
        name: Sides(tuple(seconds[i]), tuple(seconds[-1]), found[i], found[-1])
        for i, name in enumerate(ways)
    }


def spread(values: Sequence[float], digits: int) -> str:
    """The median, and from the least to the most."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def row(
    title: str,
    weights: str,
    sides: Sides,
    *,
    at_least: float | None,
    errors: tuple[float, float] | None = None,
    worse: float | None = None,
    found: tuple[str, str] = ("", ""),
    peak: float | None = None,
) -> list[str]:
    """The cells of one line; `errors` are ours and the plain one's, None is no bound."""
    if errors is not None:
        found = (f"{errors[0]:.4f}", f"{errors[1]:.4f}")
    return [
        title,
        weights,
        spread(sides.ours, 2),
        spread(sides.plain, 2),
        spread(sides.times_faster, 1 if min(sides.times_faster) > 5 else 2),
        "" if at_least is None else f"≥ {at_least:.3g}",
        *found,
        "" if errors is None else f"{errors[0] / errors[1]:.4f}",
        "" if worse is None else f"≤ {worse:.4g}",
        "" if peak is None else f"{peak / 1e9:.2f}",
    ]
