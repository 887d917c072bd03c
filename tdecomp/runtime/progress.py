"""The one bar of long work: what is going on, how long it still takes, the error so far."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import TqdmWarning, tqdm

Item = TypeVar("Item")

_COUNTED = "{desc}: {percentage:3.0f}%|{bar}| {unit} [{elapsed}, {remaining} left{postfix}]"
_UNCOUNTED = "{desc}: {unit} [{elapsed}{postfix}]"
_ONCE = "{desc} [{elapsed}{postfix}]"


class Progress:
    """The bar of one call, in terminals and notebooks; silent unless it is `shown`.

    The steps of the call follow one another in the same line, which is gone when the last one has
    ended. A step within another one is told in words beside it.
    """

    def __init__(self, shown: bool, interval: float = 0.1) -> None:
        self.shown = shown
        self._interval = interval  # the seconds between two changes of the numbers
        self._open: list[Step] = []
        self._bar: Any = None

    @classmethod
    def of(cls, shown: "bool | Progress") -> "Progress":
        """A bar as it is, or a new one for a user's ``progress=``."""
        return shown if isinstance(shown, Progress) else cls(shown)

    @contextmanager
    def step(
        self, title: str, count: int = 0, unit: str = "", *, work: int = 0, words: str = ""
    ) -> Iterator["Step"]:
        """One thing that is done `count` times, or an unknown number of times for 0.

        `work` is the sum of what is given to `Step.advance`, by default the count.
        """
        step = Step(self, title, count, unit, words)
        if not self.shown:
            yield step
            return
        self._open.append(step)
        if len(self._open) == 1:
            total = work or count or None
            self._bar = _bar_class()(
                total=total, desc=title, leave=False, miniters=0,
                mininterval=self._interval, unit=step.counted,
                bar_format=_COUNTED if total else _UNCOUNTED if unit else _ONCE,
            )  # fmt: skip
        try:
            self.show(step)
            yield step
        finally:
            if step in self._open:  # not if the one around it has ended before
                del self._open[self._open.index(step) :]
            if not self._open:
                self._bar.refresh()  # for those who read it in a file
                self._bar.close()

    def over(
        self,
        items: Iterable[Item],
        title: str,
        count: int = 0,
        unit: str = "",
        words: Callable[[], str] = str,
    ) -> Iterator[Item]:
        """The items, each of which is done when the next one is asked for, as `words` tell then."""
        with self.step(title, count, unit) as step:
            for item in items:
                yield item
                step.advance(words())

    def show(self, changed: "Step", work: int = 0) -> None:
        """Show the open steps: at once, or with `work` that was done, as often as can be read."""
        if not self._open:
            return
        outermost, *within = self._open
        words = [outermost.words, *(f"{step.title} {step.counted}".strip() for step in within)]
        self._bar.unit = outermost.counted
        self._bar.set_postfix_str(", ".join(filter(None, words)), refresh=False)
        if work:
            self._bar.update(work if changed is outermost else 0)
        else:
            self._bar.refresh()


class Step:
    """A part of a call that is going on."""

    def __init__(self, progress: Progress, title: str, count: int, unit: str, words: str) -> None:
        self.title, self.words = title, words
        self._progress, self._count, self._unit, self._done = progress, count, unit, 0

    @property
    def counted(self) -> str:
        """How much of it is done."""
        of = f"/{_amount(self._count, self._unit)}" if self._count else ""
        return f"{_amount(self._done, self._unit)}{of} {self._unit}" if self._unit else ""

    def advance(self, words: str = "", *, count: int = 1, work: int = 0) -> None:
        """One more is done; words, such as the error so far, replace those before."""
        self._done += count
        self.words = words or self.words
        self._progress.show(self, work or count)

    def say(self, words: str) -> None:
        """Change the words beside the bar."""
        self.words = words
        self._progress.show(self)


SILENT = Progress(False)


def _amount(number: int, unit: str) -> str:
    """The number itself; of bytes, three digits and a prefix."""
    return tqdm.format_sizeof(number) if unit == "B" else str(number)


def _bar_class() -> Any:
    """The bar of tqdm for notebooks where it can be shown, else that for terminals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmWarning)  # a notebook without ipywidgets
        from tqdm.autonotebook import tqdm as bar
    return bar
