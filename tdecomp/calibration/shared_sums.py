"""One sum for all layers that see the same inputs, such as queries, keys and values.

The tensor that a call gets tells: layers share as long as each call of one gets the very tensor,
unchanged since, that the same call of the others gets. As soon as one does not, it goes on alone,
from a copy of what was summed up before that call, so that every layer has the sum of its inputs.
torch counts its own changes of a tensor, but none by way of `.data`, of NumPy or of kernels that
others wrote: sums of the values show those.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Generic, Protocol, Self, TypeVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor


class Sum(Protocol):
    """What inputs are added to."""

    def copied(self) -> Self:
        """The same sum, which goes on apart from this one."""


Summed = TypeVar("Summed", bound=Sum)


class _Group(Generic[Summed]):
    """Layers that have seen the same inputs, and their sum."""

    def __init__(self, total: Summed, name: str, key: Hashable | None) -> None:
        self.total, self.key = total, key
        self.before: Summed | None = None  # the latest call was added
        self.calls = 0
        self.members = {name}
        self.arrived: set[str] = set()  # members that have made the latest call
        self._seen: tuple[ReferenceType[Tensor], int, list[Tensor]] | None = None

    def add(self, x: Tensor, add: Callable[[Summed], Any]) -> None:
        """The next call of the first member that makes it."""
        # One that is alone is not left behind; at its first call others may still join it.
        shared = len(self.members) > 1 or (not self.calls and self.key is not None)
        self.before = self.total.copied() if shared else None
        # What happens to a tensor of inference mode is not counted, nor are sparse ones summed up.
        dense = x.layout == torch.strided and not x.is_nested
        told = shared and dense and not x.is_inference()
        self._seen = (ref(x), x._version, _sums_of_values(x)) if told else None
        self.calls += 1
        add(self.total)

    def forget_input(self) -> None:
        """Whoever has not made the latest call does not make it any more."""
        self._seen = None

    def sees(self, x: Tensor) -> bool:
        """Whether the latest call got this very tensor, unchanged since."""
        if self._seen is None:
            return False
        tensor, version, sums = self._seen
        if tensor() is not x or x._version != version:
            return False
        return all(map(torch.equal, sums, _sums_of_values(x)))


def _sums_of_values(x: Tensor) -> list[Tensor]:
    """Those of each row, and of each column over all rows: few numbers, which most changes move."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    *before, last = range(x.dim())
    return [x.sum(dim=dims, dtype=dtype) for dims in ((last,), (*before,)) if dims]


class SharedSums(Generic[Summed]):
    """The sums of layers by name; those of a `key` share one while they see the same inputs.

    Layers whose key is None never share.
    """

    def __init__(self, keys: Mapping[str, Hashable | None], start: Callable[[str], Summed]) -> None:
        self._keys, self._start = keys, start
        self._groups: dict[str, _Group[Summed]] = {}
        # By the key and the input, where a call of this batch was the first of its layer.
        self._begun: dict[tuple[Hashable, int], _Group[Summed]] = {}

    def begin(self) -> None:
        """The next batch begins: its calls are others, even if their input is the same tensor.

        Other rows of it may count.
        """
        self._begun.clear()
        for group in self._groups.values():
            group.forget_input()

    def add(self, name: str, x: Tensor, add: Callable[[Summed], Any]) -> None:
        """Have `add` add the input x of a layer's call to its sum, if no other call just has."""
        group = self._groups.get(name)
        if group is None:
            group = self._joined(name, x)
            if name in group.arrived:
                return
        elif name in group.arrived:
            if left_behind := group.members - group.arrived:
                self._leave(group, left_behind)
        elif group.sees(x):
            group.arrived.add(name)
            return
        else:
            group = self._leave(group, {name})
        group.arrived = {name}
        group.add(x, add)

    def sums(self) -> Iterable[Summed]:
        """Each sum that layers share, once, and the copies that are held of them."""
        for group in {id(group): group for group in self._groups.values()}.values():
            yield group.total
            if group.before is not None:
                yield group.before

    def of(self, name: str) -> Summed:
        """The sum of a layer, an empty one before its first call."""
        group = self._groups.get(name)
        return self._start(name) if group is None else group.total

    def taken(self) -> Iterable[tuple[Summed, list[str]]]:
        """Each sum and its layers, once; afterwards nothing is held."""
        for group in [*{id(group): group for group in self._groups.values()}.values()]:
            if left_behind := group.members - group.arrived:
                self._leave(group, left_behind)
        groups = {id(group): group for group in self._groups.values()}
        self._groups.clear()
        while groups:
            group = groups.pop(next(iter(groups)))
            group.before = None
            yield group.total, sorted(group.members)

    def _joined(self, name: str, x: Tensor) -> _Group[Summed]:
        """The group that began in this batch, and whose only call got x; or a new one."""
        key = self._keys[name]
        place = key, id(x)
        group = self._begun.get(place)
        if group is not None and key is not None and group.calls == 1 and group.sees(x):
            group.members.add(name)
            group.arrived.add(name)
        else:
            group = self._begun[place] = _Group(self._start(name), name, key)
        self._groups[name] = group
        return group

    def _leave(self, group: _Group[Summed], names: set[str]) -> _Group[Summed]:
        """A group of those that have not made the latest call, with all calls before it."""
        assert group.before is not None
        apart = _Group(group.before.copied(), next(iter(names)), group.key)
        apart.calls, apart.members, apart.arrived = group.calls - 1, {*names}, {*names}
        group.members -= names
        if len(group.members) == 1:
            group.before = None
        self._groups |= dict.fromkeys(names, apart)
        return apart
