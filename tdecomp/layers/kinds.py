"""The kinds of layers that can be decomposed; a new one is a file beside this and a line here."""

from typing import Any

from tdecomp.layers.conv1d import Conv1D
from tdecomp.layers.embedding import Bag, Table
from tdecomp.layers.grouped_linear import GroupedLinearKind
from tdecomp.layers.spec import KINDS, LayerKind, LayerSpec
from tdecomp.layers.stock import STOCK_KINDS


def register_layer_kind(kind: LayerKind) -> LayerKind:
    """Let a kind of layers be found and decomposed, from now on and in every model.

    >>> class MyKind(tdecomp.LayerKind):     # MyLinear stores its weight as (in, out)
    ...     name = "MyLinear"
    ...     def base_class(self, module):
    ...         return MyLinear if isinstance(module, MyLinear) else None
    ...     def spec_of(self, module):
    ...         return tdecomp.LayerSpec(*module.weight.shape, bias=module.bias is not None)
    ...     def build(self, spec, device, dtype):
    ...         return MyLinear(spec.in_channels, spec.out_channels).to(device, dtype)
    ...     def to_forward_layout(self, weight, spec):
    ...         return weight.T
    ...     def from_forward_layout(self, kernel, spec):
    ...         return kernel.T
    >>> tdecomp.register_layer_kind(MyKind())     # doctest: +SKIP

    Parameters
    ----------
    kind : LayerKind
        An instance. Where several kinds match a module, the one registered last is used.

    Returns
    -------
    LayerKind
        The same one.

    Raises
    ------
    TypeError, ValueError
        If it is not an instance of `LayerKind`, or its name is empty or another kind's.
    """
    if not isinstance(kind, LayerKind):
        got = f"the class {kind.__name__}" if isinstance(kind, type) else type(kind).__name__
        raise TypeError(f"register_layer_kind: expected an instance of LayerKind, got {got}")
    enter_under_its_name("register_layer_kind", kind, KINDS)
    return kind


def check_registered(spec: LayerSpec, where: str) -> None:
    """Refuse a layer of a kind that this process does not know, as a worker may not."""
    if spec.kind not in KINDS:
        raise ValueError(
            f"{where}: no layer kind of this name is registered in the process that fits it; "
            "expected tdecomp.register_layer_kind to have run in every worker: "
            "ProcessPoolExecutor(initializer=...), Client.run(...) or a preload script with Dask"
        )


def enter_under_its_name(caller: str, entry: Any, registry: dict[str, Any]) -> None:
    """Enter an object with a `name`; a ValueError if that is empty or another class has it."""
    name, mine = getattr(entry, "name", ""), type(entry)
    if not name or not isinstance(name, str):
        raise ValueError(f"{caller}: {mine.__name__} needs a name, got {name!r}")
    known = type(registry.get(name, entry))
    # A class of the same module and name is the same one, defined again as in a notebook.
    if repr(known) != repr(mine):
        taken = f"{name!r} is the name of {known.__name__} already"
        raise ValueError(f"{caller}: {taken}; choose another")
    registry[name] = entry


_KINDS: tuple[LayerKind, ...] = (*STOCK_KINDS, Conv1D(), Table(), Bag(), GroupedLinearKind())
for _kind in _KINDS:
    register_layer_kind(_kind)
