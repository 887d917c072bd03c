"""What a model's chains get, and what the original's layers give, for the same batches."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from tdecomp.calibration.accumulator import enough
from tdecomp.calibration.memory import free_memory
from tdecomp.calibration.passes import Batches
from tdecomp.layers.patches import count_patches, dense
from tdecomp.model.batches import copied, count_samples, in_parts
from tdecomp.recovery.lockstep import (
    Ended,
    Passes,
    Pick,
    Place,
    first_input,
    meetings,
    shown_at,
    take_turns,
)
from tdecomp.recovery.replaced import ReplacedLayer
from tdecomp.runtime.threads import thread_count

# Layers are fitted to at least this many samples, if there are so many.
_SAMPLES = 512
# Below this many patches for each entry of a patch, variants of the batches go along.
_FEW = 16
# Samples that are held out go along up to this number.
_HELD = 256
_HELD_SHARE = 0.2  # of the samples, where memory is short
# A sample keeps about so many times what goes into a layer and comes out, in two models.
_ALIVE = 3.0
# So many samples show whether passes can take turns.
_TRIED = 4


@dataclass(frozen=True)
class Item:
    """A batch that goes through both models."""

    batch: Any
    held: bool  # fits are judged by it, and not made to it
    number: int  # the place of this batch, or of the one that it is a variant of, among its like

    @property
    def samples(self) -> int:
        return count_samples(self.batch)


Calls = list[tuple[Tensor, Tensor]]  # a chain's input and its layer's output in each
Arrivals = Iterable[tuple[Item, Calls]]


@dataclass(frozen=True)
class Walk:
    """The way of the same batches through both models, from chain to chain.

    Where passes can take turns it is one pass of each model, and a pass for each chain elsewhere:
    where a model writes a state of its own or draws random numbers, and at chains that are called
    several times, which no pass could leave with the same weights each time.
    """

    model: nn.Module
    original: nn.Module
    batches: Batches
    calls: Counter[ReplacedLayer]  # of each chain in a pass over the first batch, in its order
    patches: dict[ReplacedLayer, float]  # that each chain gets of a sample
    nbytes: float  # that a sample takes while it waits

    @classmethod
    def through(
        cls,
        model: nn.Module,
        original: nn.Module,
        replaced: Sequence[ReplacedLayer],
        batches: Batches,
        device: torch.device,
    ) -> "Walk":
        """Run the first batch to see in which order it reaches the chains."""
        calls: Counter[ReplacedLayer] = Counter()
        patches: dict[ReplacedLayer, float] = defaultdict(float)
        first = next(batches.on(device))
        samples, nbytes = count_samples(first), [0.0]

        def count(layer: ReplacedLayer, x: Tensor) -> None:
            calls[layer] += 1
            if not layer.spec.transposed:
                positions = count_patches(dense(x), layer.spec)
                patches[layer] += positions / samples
                entries = x.numel() + positions * layer.spec.out_channels
                nbytes.append(_ALIVE * entries * x.element_size() / samples)

        with shown_at({layer: layer.chain for layer in replaced}, count, before=True):
            batches.run(model, first)
        return cls(model, original, batches, calls, patches, max(nbytes))

    def items(
        self, layers: Sequence[ReplacedLayer], device: torch.device, varied: int = 0
    ) -> tuple[list[Item], str | None]:
        """As many batches as these layers need, variants up to `varied` samples, and held-out ones.

        Of these, as many as the memory holds, with words about it if it does not hold all.
        """
        per = self.patches
        needed = max(varied, _SAMPLES, *(enough(layer.spec) / per[layer] for layer in layers))
        few = max(varied, *(_FEW * layer.spec.fan_in / per[layer] for layer in layers))
        room = self._room(device)
        most = min(needed, (1 - _HELD_SHARE) * room)
        items: list[Item] = []
        samples = 0
        # Copies, as a loader may fill the same tensors again for the next batch.
        for batch in self.batches.on(device):
            items.append(Item(copied(batch), False, len(items)))
            samples += items[-1].samples
            if samples >= most:
                break
        count = len(items)
        if samples < min(few, most):
            for number, batch in enumerate(self.batches.variants(device)):
                items.append(Item(batch, False, number % count))
                samples += items[-1].samples
                if samples >= min(few, most):
                    break
        held = 0
        for number, batch in enumerate(self.batches.held_out_on(device)):
            if not self.batches.holds_out or held >= min(_HELD, room - samples):
                break
            items.append(Item(copied(batch), True, number))
            held += items[-1].samples
        short = most <= samples < needed
        words = f"fitted to {samples} samples: the memory (max_memory) holds no more at a time"
        return items, words if short else None

    def _room(self, device: torch.device) -> float:
        """The number of samples that may wait at the same time."""
        limit = self.batches.data.max_memory
        if limit is None:
            free = free_memory(device)
            limit = None if free is None else free // 2
        return math.inf if limit is None or not self.nbytes else limit / self.nbytes

    def arrivals(
        self, layers: Sequence[ReplacedLayer], items: Sequence[Item]
    ) -> Iterator[tuple[ReplacedLayer, Arrivals]]:
        """Each of the layers in its turn, with what all batches show there.

        What is changed at a layer holds for the later ones.
        """
        order = [layer for layer in self.calls if layer in layers]
        turns = self.takes_turns(order, items)
        for together, some in groupby(order, lambda layer: turns and self.calls[layer] == 1):
            if together:
                yield from self._in_lockstep([*some], items)
            else:
                yield from ((layer, self._one_by_one(layer, items)) for layer in some)

    def takes_turns(self, order: Sequence[ReplacedLayer], items: Sequence[Item]) -> bool:
        """Whether the model's passes can run in turns, tried on a few samples."""
        few = max(1, min(_TRIED, items[0].samples // 2))
        chains = {layer: layer.chain for layer in order}
        with suppress(Exception):  # a batch may have no parts, or the model may not take them
            parts = in_parts(items[0].batch, few, 2 * few)
            return take_turns(self._runs(self.model, parts), chains)
        return take_turns(self._runs(self.model, [item.batch for item in items[:2]]), chains)

    def _in_lockstep(
        self, layers: Sequence[ReplacedLayer], items: Sequence[Item]
    ) -> Iterator[tuple[ReplacedLayer, Arrivals]]:
        chains = {layer: layer.chain for layer in layers}
        replaced = {layer: layer.layer for layer in layers}
        for layer, found in self.meetings(chains, replaced, items):
            yield layer, ((item, [(x, y)]) for item, x, y in found)
            found.clear()  # what follows from it takes its place

    def meetings(
        self,
        places: Mapping[Place, nn.Module],
        ends: Mapping[Place, nn.Module],
        items: Sequence[Item],
        pick: Pick = first_input,
    ) -> Iterator[tuple[Place, list[tuple[Item, Any, Any]]]]:
        """For each place, in order, what the model gives a module and the original's one returns.

        All batches run in turns; what is changed at a place holds from there on.
        """
        mine, theirs = (
            self._runs(model, [item.batch for item in items])
            for model in (self.model, self.original)
        )
        with (
            Passes(mine, places, before=True, pick=pick) as given,
            Passes(theirs, ends, before=False) as wanted,
        ):
            abreast = thread_count() > 1 and not self._share_modules()
            for place, found in meetings(given, wanted, [*places], abreast=abreast):
                yield place, [(items[number], x, y) for number, x, y in found]

    def _one_by_one(self, layer: ReplacedLayer, items: Sequence[Item]) -> Arrivals:
        for item in items:
            y = self._seen(self.original, layer, layer.layer, item.batch, before=False)
            x = self._seen(self.model, layer, layer.chain, item.batch, before=True)
            # Both models make the same calls; a batch may make fewer of them than the first did.
            yield item, list(zip(x, y, strict=False))

    def _seen(
        self, model: nn.Module, layer: ReplacedLayer, module: nn.Module, batch: Any, *, before: bool
    ) -> list[Tensor]:
        """What each call of a module shows; the pass ends with the last one."""
        found: list[Tensor] = []

        def take(_: ReplacedLayer, tensor: Tensor) -> None:
            found.append(tensor.clone())
            if len(found) == self.calls[layer]:
                raise Ended

        with shown_at({layer: module}, take, before=before), suppress(Ended):
            self.batches.run(model, batch)
        return found

    def _share_modules(self) -> bool:
        """Whether a module of one model is in the other: it may hold what a pass has to itself."""
        return not {*self.model.modules()}.isdisjoint(self.original.modules())

    def _runs(self, model: nn.Module, batches: Sequence[Any]) -> list[Callable[[], Any]]:
        return [partial(self.batches.run, model, batch) for batch in batches]
