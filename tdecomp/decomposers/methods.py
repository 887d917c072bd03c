"""What a user may give as `methods`: one, several, or the name of a group."""

from collections.abc import Mapping, Sequence
from typing import Any

from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.registry import get_decomposer, registered

# Names that stand for several methods; () is all that there are.
_GROUPS: Mapping[str, tuple[str, ...]] = {
    "auto": (),
    "dense": ("svd", "lowrank", "spatial", "tucker2"),
}
Methods = str | Decomposer | Sequence[str | Decomposer]


def listed_methods(methods: Methods) -> list[Decomposer]:
    """The decomposers that a user means by a name, a group's name, or several of them."""
    if isinstance(methods, str) and methods in _GROUPS:
        return [get_decomposer(name) for name in _GROUPS[methods] or registered()]
    listed = [methods] if isinstance(methods, (str, Decomposer)) else _listed(methods)
    if not listed:
        raise ValueError("methods: expected at least one method, got an empty sequence")
    found = [get_decomposer(method) for method in listed]
    names = [d.name for d in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"methods: each at most once, got {', '.join(map(repr, twice))} twice")
    return found


def _listed(methods: Any) -> list[Any]:
    # Anything that is no sequence is one method, which get_decomposer will refuse in words.
    return list(methods) if isinstance(methods, (list, tuple)) else [methods]
