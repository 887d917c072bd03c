"""Which layers a user wants decomposed: names, globs, sizes."""

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from tdecomp.layers.spec import LayerSpec, kind_of


@dataclass(frozen=True)
class Filters:
    """Which layers a user wants decomposed."""

    # Names, globs, or names of containers; no `include` means all layers.
    include: str | Sequence[str] = ()
    exclude: str | Sequence[str] = ()
    where: Callable[[nn.Module, str], bool] | None = None

    def __post_init__(self) -> None:
        for option in ("include", "exclude"):
            given = getattr(self, option)
            listed = isinstance(given, Iterable) and not isinstance(given, str)
            patterns = tuple(given) if listed else () if given is None else (given,)
            if not all(isinstance(pattern, str) for pattern in patterns):
                raise TypeError(f"{option}: expected names or globs of layers, got {given!r}")
            object.__setattr__(self, option, patterns)
        if self.where is not None and not callable(self.where):
            expected = "a callable (module, name) -> bool, such as tdecomp.at_least(channels=16)"
            raise TypeError(f"where: expected {expected}, or None for all; got {self.where!r}")

    def check(self, names: Sequence[str]) -> None:
        """Refuse patterns that match none of `names`."""
        for option in ("include", "exclude"):
            for pattern in getattr(self, option):
                if not any(matches(name, pattern) for name in names):
                    raise no_match(option, pattern, names)

    def reason(self, module: nn.Module, names: Sequence[str], spec: LayerSpec) -> str | None:
        """Why this layer is not wanted, or None."""
        if self.include and not any(matches(n, p) for n in names for p in self.include):
            return "not in include"
        for pattern in self.exclude:
            if any(matches(name, pattern) for name in names):
                return f"excluded by {pattern!r}"
        if isinstance(self.where, AtLeast):  # which needs no module
            narrow = min(spec.in_channels, spec.out_channels)
            words = f"narrower than where={self.where}: its narrower side has {narrow}"
            return None if self.where.takes(spec) else words
        wanted = self.where is None or self.where(module, names[0])
        return None if wanted else "not wanted by where"


@dataclass(frozen=True)
class AtLeast:
    """A predicate that wants layers of at least this width on both sides; see `at_least`."""

    channels: int
    features: int

    def __call__(self, module: nn.Module, name: str = "") -> bool:
        del name
        return kind_of(module) is not None and self.takes(LayerSpec.of(module))

    def takes(self, spec: LayerSpec) -> bool:
        """Whether a layer of these sizes is wide enough."""
        least = self.channels if spec.ndim else self.features
        return min(spec.in_channels, spec.out_channels) >= least

    def __str__(self) -> str:
        return f"at_least(channels={self.channels}, features={self.features})"


def at_least(channels: int = 0, features: int = 0) -> AtLeast:
    """A `where` for wide layers only: narrow ones cost little and lose much.

    >>> wide = at_least(channels=16, features=64)
    >>> wide(nn.Conv2d(3, 64, 3), "stem"), wide(nn.Linear(64, 64), "fc")
    (False, True)

    Parameters
    ----------
    channels, features : int
        The fewest inputs or outputs of a convolution, and of a layer without spatial dimensions.

    Returns
    -------
    callable ``(module, name) -> bool``
        It can be pickled.

    Raises
    ------
    ValueError
        For a width that is not a whole number of 0 or more.
    """
    for name, value in (("channels", channels), ("features", features)):
        if type(value) is not int or value < 0:
            expected = f"{name} to be a whole number of 0 or more"
            raise ValueError(f"at_least: expected {expected}, got {value!r}")
    return AtLeast(channels, features)


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` is this name, a glob that fits it, or a container that holds it."""
    return name == pattern or fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def no_match(option: str, pattern: str, names: Sequence[str]) -> ValueError:
    """The error for a pattern that matches no layer."""
    if not names:
        return ValueError(f"{option}: {pattern!r} matches none of the layers: the model has none")
    near = difflib.get_close_matches(pattern, names, n=3) or names[:3]
    return ValueError(
        f"{option}: {pattern!r} matches no Linear or convolution of the model. Expected a layer's "
        f"name, a container's name or a glob, e.g. {', '.join(map(repr, near))}"
    )
