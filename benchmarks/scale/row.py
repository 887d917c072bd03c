"""A line of the table that `python -m benchmarks.scale` prints."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ScaleRow:
    """What was measured, what it must reach, and what it reaches."""

    what: str
    bound: str
    measured: str
    within: bool | None = None  # None: there is no bound

    def cells(self) -> list[str]:
        """The cells of its line; the last one is empty where there is no bound."""
        verdict = {True: "yes", False: "NO", None: ""}[self.within]
        return [self.what, self.bound, self.measured, verdict]
