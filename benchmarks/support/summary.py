"""Rows that differ in their seed alone, as one line with mean and spread."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import nan
from statistics import fmean, stdev

from benchmarks.support.rows import NO_RECOVERY, ORIGINAL, Row, Run


@dataclass(frozen=True)
class Line:
    """One network as several seeds make it."""

    run: Run  # of the first seed
    rows: Sequence[Row]

    def values(self, name: str) -> list[float]:
        """What was measured under a name; empty where it failed or does not apply."""
        found = (getattr(row.found, name) for row in self.rows)
        return [value for value in found if value is not None]

    def mean(self, name: str) -> float:
        """NaN where there is none."""
        values = self.values(name)
        return fmean(values) if values else nan

    def spread(self, name: str) -> float | None:
        """The standard deviation over the seeds, where there are several; time is measured once."""
        values = self.values(name)
        return stdev(values) if len(values) > 1 and not name.startswith("time_") else None

    @property
    def curve(self) -> tuple[str, str, str]:
        """What the lines of one curve have in common, besides their stage."""
        return self.run.method, self.run.fitted, self.run.ranks


def lines_of(rows: Iterable[Row]) -> list[Line]:
    """One line for all seeds, in the order of the first."""
    groups: dict[Run, list[Row]] = {}
    for row in rows:
        groups.setdefault(replace(row.run, seed=0), []).append(row)
    return [Line(group[0].run, group) for group in groups.values()]


def each_once(lines: Iterable[Line], name: str) -> list[Line]:
    """For each curve and share the first line that has a value, whatever was done after it."""
    found: dict[tuple[tuple[str, str, str], float], Line] = {}
    for line in lines:
        if line.values(name):
            found.setdefault((line.curve, line.run.share), line)
    return list(found.values())


def stages_of(lines: Iterable[Line]) -> list[tuple[str, int]]:
    """What was done after the decomposition: without fine-tuning first."""
    found = dict.fromkeys(line.run.stage for line in lines if line.run.method != ORIGINAL)
    return sorted(found, key=lambda stage: stage[1] > 0)


def stage_in_words(stage: tuple[str, int]) -> str:
    """A heading for a stage."""
    recover, steps = stage
    words = [] if recover == NO_RECOVERY else [recover.replace("+", ", then ")]
    words += [f"{steps} steps of fine-tuning"] if steps else []
    return f"after {', then '.join(words)}" if words else "as decomposed"


def curve_in_words(curve: tuple[str, str, str]) -> str:
    """The method, what its factors were fitted to, and how its ranks were chosen if not evenly."""
    method, fitted, ranks = curve
    words = method if fitted == "weights" else f"{method}, {fitted}"
    return words if ranks == "uniform" or method in ("auto", "dense") else f"{words}, {ranks}"


def best_of(lines: Iterable[Line], name: str) -> dict[float, list[Line]]:
    """At each share the lines with the highest quality, or the lowest error: all that are equal."""
    sign = 1 if name == "quality" else -1
    best: dict[float, list[Line]] = {}
    for line in lines:
        if line.run.method != ORIGINAL and line.values(name):
            known = best.setdefault(line.run.share, [])
            ahead = sign * (line.mean(name) - known[0].mean(name)) if known else 1.0
            if ahead > 0:
                known.clear()
            if ahead >= 0:
                known.append(line)
    return best
