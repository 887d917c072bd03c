"""One hand for all pictures: how each method looks, how large things are."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from tdecomp.decomposers.registry import registered

WIDTH = 7.5  # inches: pictures are read at the width of a page
TEXT, SMALL = 9, 8  # points
DARK, GREY, LIGHT = "#1a1a1a", "#8a8a8a", "#e2e2e2"
KEPT, LOST = "#0072b2", "#d55e00"
# Colours that people with colour blindness tell apart (Okabe and Ito 2008); hatches, markers and
# lines tell methods apart in print.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")
_HATCHES = ("", "////", "\\\\\\\\", "xxxx", "----", "||||", "++++", "oooo")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
_DASHES: tuple[Any, ...] = (
    "-", (0, (6, 1.5)), (0, (4, 1.5, 1, 1.5)), (0, (1.5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 3)),
    (0, (1, 2)), (0, (10, 1, 1, 1)),
)  # fmt: skip

Item = TypeVar("Item")


@dataclass(frozen=True)
class Look:
    """How a method is drawn, whatever the picture."""

    colour: str
    hatch: str
    marker: str
    dashes: Any


def looks_of(methods: Iterable[str]) -> dict[str, Look]:
    """The look of each method, that of a registered one by its place in the registry."""
    listed = dict.fromkeys(methods)
    order = [*registered(), *(method for method in listed if method not in registered())]
    return {method: _look(i) for i, method in enumerate(order) if method in listed}


def _look(place: int) -> Look:
    lap, i = divmod(place, len(_COLOURS))
    j = (i + lap) % len(_MARKERS)  # a second lap pairs colours and markers anew
    return Look(_COLOURS[i], _HATCHES[j], _MARKERS[j], _DASHES[j])


def largest(items: Sequence[Item], amount: Callable[[Item], float], most: int) -> list[Item]:
    """The `most` items of the largest amounts, in their order: of 200 layers nobody sees each."""
    kept = sorted(range(len(items)), key=lambda i: -amount(items[i]))[:most]
    return [items[i] for i in sorted(kept)]


def shortened(name: str, most: int = 30) -> str:
    """At most that many characters of a layer's name: its end, which tells layers apart."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


@contextmanager
def needs_matplotlib(caller: str) -> Iterator[None]:
    """Say which extra installs it where an import inside fails."""
    try:
        yield
    except ImportError as error:
        words = f"{caller} needs matplotlib: pip install 'tdecomp-torch[plot]'"
        raise ImportError(words) from error
