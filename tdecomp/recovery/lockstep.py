"""All batches through two models at once, which wait for one another at the same places.

Each pass runs in a thread of its own, one of each model at a time. It stops where one of the places
begins or ends, until whoever runs the passes lets it go on: what all batches show at a place is
there together, and what is changed there holds for the rest of the same passes.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from tdecomp.runtime.parallel import OneThread
from tdecomp.runtime.scope import Scope, interrupts_deferred
from tdecomp.runtime.threads import give_one_thread, thread_count
from tdecomp.runtime.torch_state import hooks

Place = TypeVar("Place")
# What is taken of the arguments, and of the named ones, that a module is called with.
Pick = Callable[[tuple[Any, ...], dict[str, Any]], Any]


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first of a module's inputs, however it is given."""
    return next(iter((*args, *kwargs.values())))


class Ended(BaseException):
    """The pass is not needed any more. Not an Exception, so that no `except Exception` stops it."""


class _Pass(Generic[Place]):
    """One pass in its thread. `at` is where it waits; `shown` is what it showed at each place."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.at: Place | None = None
        self.shown: dict[Place, Any] = {}
        self.over = False
        self._error: BaseException | None = None
        self._leaving = False
        self._threads = thread_count()  # of torch, in the thread that makes it
        # Each is free only for the moment in which one side tells the other to go on.
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()
        arguments = (self._run, run, _thread_settings())
        self._thread = threading.Thread(target=copy_context().run, args=arguments, daemon=True)

    def start(self) -> None:
        with interrupts_deferred():  # a thread interrupted at its start would be on its own
            self._thread.start()

    def go_on(self) -> None:
        """Let it run until it waits again or is over."""
        self.at = None
        self._go.release()

    def await_it(self, patience: float) -> None:
        """Until it waits or is over; raises what the model raises."""
        if not self._back.acquire(timeout=patience):
            raise TimeoutError("the pass waits for something else")
        if self._error is not None:
            raise self._error

    def wait(self, place: Place, value: Any) -> None:
        """In the pass itself: show this, and stop until `go_on`."""
        if not self._leaving:
            self.at, self.shown[place] = place, value
            self._tell()
            self._go.acquire()
        if self._leaving:
            raise Ended

    def leave(self) -> None:
        """Tell it to end at the next place."""
        self._leaving = True
        if self._go.locked():
            self._go.release()

    def join(self) -> None:
        """Wait for the end of its thread."""
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self, run: Callable[[], Any], settings: Sequence[Callable[[], Any]]) -> None:
        try:
            self._go.acquire()
            if not self._leaving:
                # Many threads with helpers of their own would slow down those of the caller.
                give_one_thread(self._threads)
                with Scope() as scope:
                    for setting in settings:
                        scope.undo.enter_context(setting())
                    run()
        except Ended:
            pass
        except BaseException as error:  # raised again by `go_on`
            self._error = error
        self.over = True
        self._tell()

    def _tell(self) -> None:
        if self._back.locked():  # else nobody took notice of the last time
            self._back.release()


class Passes(Scope, Generic[Place]):
    """Inside, passes of one model that stop at its modules: `before` they run, or after.

    Each shows the module's first input, or its output. `places` that are taken away are passed by.
    """

    def __init__(
        self,
        runs: Sequence[Callable[[], Any]],
        places: Mapping[Place, nn.Module],
        *,
        before: bool,
        patience: float = -1.0,
        pick: Pick = first_input,
    ) -> None:
        super().__init__()
        self._pick = pick
        self.places = dict(places)
        self._runs, self._before, self._patience = runs, before, patience
        self._running: _Pass[Place] | None = None

    def change(self) -> None:
        stops = shown_at(self.places, self._stop, before=self._before, pick=self._pick)
        self.undo.enter_context(stops)
        self.all = [_Pass[Place](run) for run in self._runs]
        self.undo.callback(self._end)
        for one in self.all:
            one.start()

    def advance(self, one: _Pass[Place]) -> None:
        """Let one of the passes go on to its next place, or to its end."""
        with self.advancing(one):
            pass

    @contextmanager
    def advancing(self, one: _Pass[Place]) -> Iterator[None]:
        """Inside, one of the passes goes on; afterwards it is at its next place, or at its end."""
        self._running = one
        one.go_on()
        yield
        one.await_it(self._patience)
        self._running = None

    def _stop(self, place: Place, value: Any) -> None:
        if self._running is not None and place in self.places:
            self._running.wait(place, value)

    def _end(self) -> None:
        for one in self.all:
            one.leave()
        for one in self.all:
            one.join()


def shown_at(
    places: Mapping[Place, nn.Module],
    show: Callable[[Place, Any], None],
    *,
    before: bool,
    pick: Pick = first_input,
) -> hooks:
    """Inside, `show` gets a module's inputs, by default the first, or its output afterwards."""

    def enter(place: Place, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        show(place, pick(args, kwargs))

    def leave(place: Place, _: Any, __: Any, output: Any) -> None:
        show(place, output)

    return hooks(
        partial(module.register_forward_pre_hook, partial(enter, place), with_kwargs=True)
        if before
        else partial(module.register_forward_hook, partial(leave, place))
        for place, module in places.items()
    )


def meetings(
    mine: Passes[Place], theirs: Passes[Place], order: Sequence[Place], *, abreast: bool = False
) -> Iterator[tuple[Place, list[tuple[int, Any, Any]]]]:
    """Each place that passes come to, with the number of each batch there and what both show.

    All of `mine` wait at some place or are over; those at the first place in `order` meet there
    with `theirs`. They go on when the next meeting is asked for, and `abreast`, one of `theirs`
    runs to its own next place while one of `mine` does: only for models without modules in common.
    """
    for _ in order:
        for one, other in zip(mine.all, theirs.all, strict=True):
            if one.at not in mine.places and not one.over:
                ahead = abreast and not other.shown and not other.over
                with theirs.advancing(other) if ahead else nullcontext():
                    mine.advance(one)
        waiting = {one.at for one in mine.all}
        place = next((place for place in order if place in mine.places and place in waiting), None)
        if place is None:
            return
        found = []
        for number, (one, other) in enumerate(zip(mine.all, theirs.all, strict=True)):
            if one.at != place:
                continue
            while place not in other.shown and not other.over:
                theirs.advance(other)
            if place in other.shown:  # else the original takes another way with this batch
                found.append((number, one.shown.pop(place), other.shown.pop(place)))
        yield place, found
        found.clear()  # what follows from it takes its place
        del mine.places[place], theirs.places[place]


def take_turns(
    runs: Sequence[Callable[[], Any]], places: Mapping[Place, nn.Module], patience: float = 10.0
) -> bool:
    """Whether passes that take turns show the same as passes one after another.

    They do not where a pass writes what another one reads, where it draws random numbers, or where
    it cannot run in a thread.
    """
    alone: list[dict[Place, Tensor]] = []
    take = shown_at(places, lambda place, x: alone[-1].update({place: x.clone()}), before=True)
    with OneThread(), take:  # as the others have: with more, torch sums up in another order
        began = time.perf_counter()
        for run in runs:
            alone.append({})
            run()
    patience += 100.0 * (time.perf_counter() - began)  # a pass may wait for a lock of another's
    try:
        with Passes(runs, places, before=True, patience=patience) as passes:
            while any(not one.over for one in passes.all):
                for one in passes.all:
                    if not one.over:
                        passes.advance(one)
            return all(map(_same, alone, (one.shown for one in passes.all)))
    except Exception:
        return False


def _same(found: Mapping[Any, Tensor], other: Mapping[Any, Tensor]) -> bool:
    return found.keys() == other.keys() and all(
        x.shape == other[place].shape and torch.allclose(x, other[place], equal_nan=True)
        for place, x in found.items()
    )


def _thread_settings() -> list[Callable[[], Any]]:
    """Blocks that give another thread the settings of torch that are the calling thread's own."""
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    blocks: list[Callable[[], Any]] = [
        partial(torch.inference_mode, inference),
        partial(torch.set_grad_enabled, gradients),
    ]
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    for kind in ("cpu", "cuda") if cuda else ("cpu",):
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        cache = torch.is_autocast_cache_enabled()
        blocks.append(partial(torch.autocast, kind, dtype, enabled, cache))
    if cuda:
        blocks.append(partial(torch.cuda.stream, torch.cuda.current_stream()))
    default = torch.get_default_device()
    return [*blocks, partial(torch.device, default)] if default.type != "cpu" else blocks
