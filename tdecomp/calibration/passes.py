"""Passes over unlabelled data: its batches, one after the other, and a model run on them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn

from tdecomp.calibration.augment import Augment
from tdecomp.calibration.data import Data
from tdecomp.calibration.moments import Moments
from tdecomp.calibration.split import Part, held_among, split_by_position
from tdecomp.model.batches import (
    Forward,
    call_model,
    copied,
    describe,
    device_of,
    fingerprint,
    moved,
    tensors_of,
)
from tdecomp.model.weights import refuse_lazy
from tdecomp.runtime.progress import SILENT, Progress
from tdecomp.runtime.torch_state import evaluating, exact_passes

PASSES = 4  # through the batches: one as they are, then in variants
_GENERATORS = 64  # of its own for each seed


@dataclass(eq=False)
class Seen:
    """What passes through the batches have shown."""

    first: list[Any] = field(default_factory=list)  # the first batch, once a pass has begun
    held: str | None = None  # what the first batch that is held out looks like, once there is one
    steady: bool = True  # False once it looked different in another pass

    def forget(self) -> None:
        """As before the first pass."""
        self.first.clear()
        self.held, self.steady = None, True

    def add_held(self, looks: str) -> None:
        """Note how the first batch that is held out looks in a pass."""
        self.steady = self.steady and self.held in (None, looks)
        self.held = looks


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches, and how to run a model on them."""

    data: Data
    caller: str  # the function that runs the model, with which error messages start
    forward: Forward = call_model
    seed: int | None = None  # all random numbers derive from it; None for those of seed 0
    progress: Progress = SILENT
    seen: Seen = field(default_factory=Seen)

    def called_by(self, caller: str) -> "Batches":
        """The same batches, used by another function."""
        return replace(self, caller=caller)

    def varied_by(self, augment: Augment | None) -> "Batches":
        """The same batches, with these variants or none."""
        return replace(self, data=replace(self.data, augment=augment))

    def taken_by(self, model: nn.Module) -> "Batches":
        """The same batches; nothing is held out if the model takes no part of the only one."""
        data = self.data
        if len(self) != 1 or data.sides is not None or isinstance(data.batches, Iterator):
            return self
        *_, (part, held) = self.parts(device_of(model))
        if held:
            try:
                with evaluating(model), exact_passes(), torch.no_grad():
                    self.run(model, part)
            except BatchError:  # its rows are no samples, such as the nodes of a graph
                self.seen.forget()
                return replace(self, data=replace(data, held_out=0.0))
        return self

    @property
    def single_pass(self) -> bool:
        """Whether they can be iterated over only once."""
        # `iter` would draw a random number of a DataLoader.
        return isinstance(self.data.batches, Iterator)

    def require_several_passes(self, reason: str) -> None:
        """Refuse batches that can be iterated over only once; `reason` says who needs more."""
        if self.single_pass:
            raise ValueError(
                f"{self.caller}: {reason} goes through the batches more than once, got "
                f"{type(self.data.batches).__name__}, which yields them only once; expected a "
                "DataLoader or a list"
            )

    def __len__(self) -> int:
        """How many there are, with those held out; 0 if this is not known."""
        batches, limit = self._iterable(), self.data.max_batches
        # `len` of a loader fails where its data set has none.
        known = 0 if self.single_pass else length_hint(batches)
        return known if limit is None else min(known, limit)

    @property
    def holds_out(self) -> bool:
        """Whether a pass has come to samples that are held out."""
        return self.seen.held is not None

    def on(self, device: torch.device) -> Iterator[Any]:
        """Yield the batches that may be fitted to, every tensor in them on `device`."""
        yield from (batch for batch, held in self.parts(device, held=False) if not held)

    def held_out_on(self, device: torch.device) -> Iterator[Any]:
        """Yield the batches that are held out; the same as `on` yields if none are."""
        none = True
        for batch, held in self.parts(device, fit=False):
            if held:
                none = False
                yield batch
        if none:
            yield from self.on(device)

    def parts(
        self, device: torch.device, *, fit: bool = True, held: bool = True
    ) -> Iterator[tuple[Any, bool]]:
        """Yield all batches that hold samples, and whether each is held out.

        Without `fit` or `held` the others are left out where that saves reading them.
        """
        empty = none_held = True
        for batch, outside in self._parts(fit, held):
            if empty and not self.seen.first:
                self.seen.first.append(batch)
            empty = False
            there = self._moved(batch, device)
            if outside and none_held:
                none_held = False
                self.seen.add_held("" if self.data.sides else fingerprint(there))
            yield there, outside
        if empty and fit:
            raise ValueError(
                f"{self.caller}: got no batches; expected at least one that holds samples (an "
                "exhausted generator has none left: pass a DataLoader or a list)"
            )

    def _parts(self, fit: bool, held: bool) -> Iterator[Part]:
        data = self.data
        if data.sides is None:
            return split_by_position(self._iterable(), data.held_out, data.max_batches)
        sides = zip(data.sides, (False, True), (fit, held), strict=True)
        return ((batch, outside) for side, outside, asked in sides if asked for batch in side)

    def _moved(self, batch: Any, device: torch.device) -> Any:
        try:
            return moved(batch, device)
        except NotImplementedError as error:  # a tensor on the meta device, or of a layout like it
            raise BatchError(
                f"{self.caller}: a batch ({describe(batch)}) cannot be copied to {device}: "
                f"{error}; expected tensors that hold values"
            ) from error

    def bar(self, device: torch.device, title: str) -> Iterator[Any]:
        """`on`, with a progress bar."""
        total = len(self) - held_among(len(self), self.data.held_out)
        return self._with_bar(self.on(device), title, total)

    def bar_of_parts(self, device: torch.device, title: str) -> Iterator[tuple[Any, bool]]:
        """`parts`, with a progress bar."""
        return self._with_bar(self.parts(device), title, len(self))

    def _with_bar(self, batches: Iterator[Any], title: str, total: int) -> Iterator[Any]:
        yield from self.progress.over(batches, title, total, "batches")

    def variants(self, device: torch.device) -> Iterator[Any]:
        """Yield the batches in further passes, varied by `data.augment`."""
        if self.data.augment is None:
            return
        for number in range(1, PASSES):
            generator = self.generator(number)
            for batch in self.on(device):
                given = copied(batch)
                other = self.data.augment(given, generator)
                pairs = zip(tensors_of(given), tensors_of(other), tensors_of(batch), strict=True)
                if all(a is b and torch.equal(b, before) for a, b, before in pairs):
                    return  # it holds nothing that `augment` varies
                yield other

    def run(self, model: nn.Module, batch: Any) -> Any:
        """The model's output for one batch; BatchError if the model rejects it."""
        refuse_lazy(model, self.caller)
        try:
            return self.forward(model, copied(batch))
        except BatchError:
            raise
        except Exception as error:
            raise BatchError(
                f"{self.caller}: the model rejected a batch ({describe(batch)}): "
                f"{type(error).__name__}: {error}. Expected what the model takes as its first "
                "argument, a tuple that starts with it, or a dict of keyword arguments; "
                "forward=lambda model, batch: ... says how else to call it, as with gradients "
                "(torch.enable_grad()), which are off here"
            ) from error

    def first_runs(self) -> list[Callable[[nn.Module], Any]]:
        """A run of a model on the first batch of a pass that was made; none before the first."""

        def run(model: nn.Module) -> Any:
            return self.forward(model, copied(moved(self.seen.first[0], device_of(model))))

        return [run] if self.seen.first else []

    def generator(self, number: int) -> torch.Generator:
        """A random generator in its first state: each number and each seed has its own."""
        return torch.Generator("cpu").manual_seed(_GENERATORS * (self.seed or 0) + number)

    def _iterable(self) -> Iterable[Any]:
        batches: Iterable[Any] = self.data.batches
        return [batches] if isinstance(batches, (Tensor, Mapping)) else batches


class BatchError(ValueError):
    """A batch that the model or the mask rejects."""


def batches_for(
    caller: str,
    data: Any,
    *,
    forward: Forward | None = None,
    seed: int | None = None,
    progress: bool | Progress = True,
    **options: Any,
) -> Batches:
    """The batches for `caller`, from a `Data`, or from batches and `options`, the fields of one."""
    if isinstance(data, Moments):
        expected = "a DataLoader or a list of batches"
        raise ValueError(f"{caller} runs the model on batches, got moments; expected {expected}")
    if isinstance(data, Data):
        named = [name for name, value in options.items() if value is not getattr(Data, name)]
        if given := ", ".join(f"{name}=..." for name in named):
            raise ValueError(
                f"{caller}: got {given} beside a Data; expected Data(batches, {given})"
            )
    else:
        data = Data(data, **options)
    _check_seed(seed)
    return Batches(data, caller, forward or call_model, seed, Progress.of(progress))


def batches_or_moments(
    data: Any,
    *,
    forward: Forward | None = None,
    seed: int | None = None,
    progress: bool | Progress = True,
) -> Batches | Moments | None:
    """What a user gave as ``data=``: None, `Moments`, or a `Data` or batches as `Batches`."""
    if forward is not None and not callable(forward):
        raise TypeError(f"expected forward to be a callable (model, batch), got {forward!r}")
    if data is None or isinstance(data, Moments):
        _check_seed(seed)
        return data
    return batches_for("data", data, forward=forward, seed=seed, progress=progress)


def _check_seed(seed: Any) -> None:
    """Raise a ValueError unless it is None or a seed that torch and NumPy take."""
    if seed is not None and not (type(seed) is int and 0 <= seed < 2**32):
        expected = "None or a whole number from 0 to 2³² - 1"
        raise ValueError(f"expected seed to be {expected}, got {seed!r}")
