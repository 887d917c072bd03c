"""What choosing ranks found out of each layer, kept for the fits and for later plans."""

from collections.abc import Callable, Hashable, Mapping
from itertools import islice
from typing import Any, TypeVar

Value = TypeVar("Value")


class LayerFits:
    """What is known of one layer: values by key, each computed at most once."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def get(self, key: Hashable, compute: Callable[[], Value], *, cheap: bool = False) -> Value:
        """The value of a key, computed if it is not known yet; `cheap` if it needs no weights."""
        del cheap  # everything is computed here
        if key not in self._known:
            self._known[key] = compute()
        value: Value = self._known[key]
        return value

    def known(self, key: Hashable) -> Any:
        """The value of a key if it was computed, else None."""
        return self._known.get(key)

    def __len__(self) -> int:
        return len(self._known)

    def since(self, count: int) -> dict[Hashable, Any]:
        """What was added when it held so many values already."""
        return dict(islice(self._known.items(), count, None))

    def learn(self, values: Mapping[Hashable, Any]) -> None:
        """Add what was computed elsewhere."""
        for key, value in values.items():
            self._known.setdefault(key, value)


class NotKnownError(BaseException):
    """Of `KnownFits`; nobody who handles errors of fits, such as a user's selector, takes it."""


class KnownFits(LayerFits):
    """What is known of a layer, to see whether that is enough: nothing but costs is computed."""

    def __init__(self, fits: LayerFits) -> None:
        self._known = fits.since(0)

    def get(self, key: Hashable, compute: Callable[[], Value], *, cheap: bool = False) -> Value:
        """The value of a key; NotKnownError where it would have to be computed."""
        if not cheap and key not in self._known:
            raise NotKnownError
        return super().get(key, compute)


class FitCache:
    """What is known of all layers: losses, drafts and fits."""

    def __init__(self) -> None:
        self._layers: dict[Hashable, LayerFits] = {}

    def of(self, layer: Hashable) -> LayerFits:
        """What is known of one layer, from now on kept here."""
        return self._layers.setdefault(layer, LayerFits())
