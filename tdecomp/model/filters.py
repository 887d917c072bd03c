"""Which layers a user wants touched: names, globs, sizes."""

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from tdecomp.layers.spec import LayerSpec


@dataclass(frozen=True)
class Filters:
    """Which layers a user wants touched.

    Attributes
    ----------
    include, exclude : sequence of str
        Names, globs, or the name of a container for all that it holds. No `include` means all.
    where : callable ``(module, name) -> bool``, optional
    min_channels : int
        Convolutions with fewer input or output channels are left alone.
    min_features : int
        Linear layers with fewer input or output features are left alone.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    where: Callable[[nn.Module, str], bool] | None = None
    min_channels: int = 0
    min_features: int = 0

    def check(self, names: Iterable[str]) -> None:
        """Refuse patterns that match none of `names`."""
        names = list(names)
        for option, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(matches(name, pattern) for name in names):
                    raise no_match(option, pattern, names)

    def reason(self, module: nn.Module, names: Sequence[str], spec: LayerSpec) -> str | None:
        """Why this layer is not wanted, or None."""
        if self.include and not any(matches(n, p) for n in names for p in self.include):
            return "not in include"
        for pattern in self.exclude:
            if any(matches(name, pattern) for name in names):
                return f"excluded by {pattern!r}"
        if self.where is not None and not self.where(module, names[0]):
            return "not wanted by where"
        least, option = self.min_features, "min_features"
        if spec.ndim:
            least, option = self.min_channels, "min_channels"
        narrow = min(spec.in_channels, spec.out_channels)
        if narrow < least:
            return f"{option}={least}, and its narrower side has {narrow}"
        return None


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` is this name, a glob that fits it, or a container that holds it."""
    return name == pattern or fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def no_match(option: str, pattern: str, names: Iterable[str]) -> ValueError:
    """The error for a pattern that matches no layer."""
    names = list(names)
    near = difflib.get_close_matches(pattern, names, n=3) or names[:3]
    return ValueError(
        f"{option}: {pattern!r} matches no Linear or convolution of the model. Expected a layer's "
        f"name, a container's name or a glob, e.g. {', '.join(map(repr, near))}"
    )
