"""The methods by name, and what a user may give as `methods`.

A new method is a file of its own, its test, and a line of `_BUILT_IN`.
"""

from collections.abc import Sequence
from typing import Any

from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.cp import CP, CPSeparable
from tdecomp.decomposers.lowrank import LowRank
from tdecomp.decomposers.spatial import Spatial
from tdecomp.decomposers.split_svd import SplitSVD
from tdecomp.decomposers.svd import SVD
from tdecomp.decomposers.tt import TT
from tdecomp.decomposers.tucker2 import Tucker2
from tdecomp.layers.kinds import enter_under_its_name

_BUILT_IN = (SVD, LowRank, Spatial, Tucker2, CP, CPSeparable, SplitSVD, TT)
_DENSE = ("svd", "lowrank", "spatial", "tucker2", "split-svd")
_REGISTRY: dict[str, Decomposer] = {}

Methods = str | Decomposer | Sequence[str | Decomposer]


def register(decomposer: Any) -> Any:
    """Give a decomposer its name for use in `plan` and `decompose`; works as a class decorator.

    >>> from tdecomp.decomposers.svd import SVD
    >>> class Mine(SVD):
    ...     name = "mine"
    >>> register(Mine) is Mine
    True

    Parameters
    ----------
    decomposer : Decomposer or type
        An instance with its options set, or a class that can be made without arguments.

    Raises
    ------
    TypeError, ValueError
        If it is not a decomposer, or its name is empty or another decomposer's.
    """
    methods = isinstance(decomposer, type) and issubclass(decomposer, Decomposer)
    instance = decomposer() if methods else decomposer
    if not isinstance(instance, Decomposer):
        raise TypeError(f"register: expected a Decomposer, got {type(instance).__name__}")
    enter_under_its_name("register", instance, _REGISTRY)
    return decomposer


def unregister(name: str) -> None:
    """Forget a method that was registered under this name."""
    del _REGISTRY[name]


def registered() -> tuple[str, ...]:
    """The names of all registered decomposers.

    >>> registered()[:4]
    ('svd', 'lowrank', 'spatial', 'tucker2')
    """
    return tuple(_REGISTRY)


def get_decomposer(method: str | Decomposer) -> Decomposer:
    """The decomposer of this name; a decomposer is taken as it is."""
    if isinstance(method, Decomposer):
        return method
    expected = f"expected one of {', '.join(map(repr, registered()))}, or a Decomposer"
    expected += " (tdecomp.register makes your own known by name)"
    if not isinstance(method, str):
        hint = " (a class: make an instance of it)" if isinstance(method, type) else ""
        raise TypeError(f"method: got {method!r}{hint}; {expected}")
    if method not in _REGISTRY:
        raise ValueError(f"unknown method {method!r}: {expected}")
    return _REGISTRY[method]


def listed_methods(methods: Methods) -> list[Decomposer]:
    """The decomposers behind a name, "auto", "dense", a decomposer, or a sequence of these."""
    listed: Any = methods
    if isinstance(methods, str):
        listed = {"auto": registered(), "dense": _DENSE}.get(methods, methods)
    # Anything that is no sequence is one method, which get_decomposer will refuse in words.
    listed = listed if isinstance(listed, (list, tuple)) else [listed]
    if not listed:
        raise ValueError("methods: expected at least one method, got an empty sequence")
    found = [get_decomposer(method) for method in listed]
    names = [d.name for d in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"methods: each at most once, got {', '.join(map(repr, twice))} twice")
    return found


for _method in _BUILT_IN:
    register(_method)
