"""Global and model state that is set for a while, and put back whatever happens.

Each setting is a `Scope`. Settings of the whole process are saved by their first user and restored
by their last, whichever thread that is. A model is used by one thread at a time.
"""

import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from functools import cache, partial
from itertools import count
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.backends import mha
from torch.utils.hooks import RemovableHandle

from tdecomp.runtime.scope import Scope, raise_pending_interrupt
from tdecomp.runtime.threads import thread_count

Value = TypeVar("Value")


# The lock of each model, with the number in the order of which several are taken.
_LOCKS: WeakKeyDictionary[nn.Module, tuple[int, threading.RLock]] = WeakKeyDictionary()
_NUMBERS, _GUARD = count(), threading.Lock()


class exclusive(Scope):
    """Inside, the models are this thread's alone; others wait at the entrance of their scopes."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self._models = models

    def change(self) -> None:
        models = [m for m in self._models if isinstance(m, nn.Module)]  # others are refused later
        with _GUARD:
            locks = dict(_LOCKS.setdefault(m, (next(_NUMBERS), threading.RLock())) for m in models)
        for _, lock in sorted(locks.items()):
            # In one expression: no error comes between the two.
            while not (lock.acquire(timeout=0.1) and [self.undo.callback(lock.release)]):
                raise_pending_interrupt()


class restoring(exclusive):
    """The whole of a public function: grad mode is restored, `models` are this thread's alone.

    With a seed, global random numbers come from it inside; their state is restored afterwards.
    """

    def __init__(self, *models: nn.Module, seed: int | None = None) -> None:
        super().__init__(*models)
        self._seed = seed

    def change(self) -> None:
        thread_count()  # a new thread's is the process's from now on
        super().change()
        self.undo.callback(torch.set_grad_enabled, torch.is_grad_enabled())
        if self._seed is not None:
            _keep_random_state(self._models, self.undo)
            torch.manual_seed(self._seed)


class evaluating(exclusive):
    """Eval mode inside; every module's mode, the buffers and the random state restored after."""

    def change(self) -> None:
        super().change()
        for module in {m: None for model in self._models for m in model.modules()}:
            self.undo.callback(setattr, module, "training", module.training)
            self.undo.callback(_put_back, module, dict(vars(module)), dict(module._buffers))
            for buffer in module._buffers.values():
                if buffer is not None:
                    with suppress(NotImplementedError):  # of 4 bits: torch cannot change it either
                        saved = buffer.data, _version(buffer), buffer.detach().clone()
                        self.undo.callback(_restore, buffer, *saved)
        _keep_random_state(self._models, self.undo)
        for model in self._models:
            model.eval()


def _put_back(
    module: nn.Module, attributes: dict[str, Any], buffers: dict[str, Tensor | None]
) -> None:
    """The buffers that there were; if others took their place, plain attributes may tell of it."""
    mine, held = module._buffers, vars(module)
    if list(map(id, mine.values())) == list(map(id, buffers.values())):
        return
    if isinstance(mine, dict):  # else it is a scripted module's, whose names are fixed
        mine.clear()
    for name, buffer in buffers.items():
        mine[name] = buffer
    for name in held.keys() - attributes.keys():
        del held[name]
    held.update(attributes)


def _restore(buffer: Tensor, data: Tensor, version: int, value: Tensor) -> None:
    if buffer.is_inference():
        return  # it cannot be changed outside of inference mode
    changed = _version(buffer) != version
    # On the meta device, and of odd layouts.
    with suppress(AttributeError, NotImplementedError, RuntimeError):
        # Changes through `.data` are no new version.
        if buffer.shape != data.shape or buffer.data_ptr() != data.data_ptr():
            buffer.data = data
        changed = changed or not torch.equal(buffer, value)
    if changed:
        with torch.no_grad():
            buffer.copy_(value)


def _version(buffer: Tensor) -> int:
    """How often it was changed in place; inference tensors cannot be, outside inference mode."""
    return 0 if buffer.is_inference() else buffer._version


class frozen(exclusive):
    """No parameter requires a gradient inside, so that only activations are kept for it."""

    def change(self) -> None:
        super().change()
        for parameter in (p for model in self._models for p in model.parameters()):
            # Inference tensors take no gradient anyway, and could not be told to again.
            if parameter.requires_grad and not parameter.is_inference():
                self.undo.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)


class hooks(Scope):
    """Hooks that are registered inside only."""

    def __init__(self, registrations: Iterable[Callable[[], RemovableHandle]]) -> None:
        super().__init__()
        self._registrations = registrations

    def change(self) -> None:
        for register in self._registrations:
            self.undo.callback(register().remove)


class no_inference_mode(Scope):
    """Tensors made inside can be trained."""

    def change(self) -> None:
        if torch.is_inference_mode_enabled():  # else it would only set the grad mode
            self.undo.enter_context(torch.inference_mode(False))


class full_precision(no_inference_mode):
    """A fit's surroundings: float32 in full, no gradients, no autocast, the fit's own device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def change(self) -> None:
        kind, undo = self._device.type, self.undo
        _MATMUL_PRECISION.hold(undo, _FULL_PRECISION)
        super().change()
        undo.callback(torch.set_grad_enabled, torch.is_grad_enabled())
        torch.set_grad_enabled(False)
        if torch.is_autocast_enabled(kind):
            undo.callback(torch.set_autocast_enabled, kind, True)
            torch.set_autocast_enabled(kind, False)
        # A device context costs time on every operation: only where it changes anything.
        if torch.get_default_device().type != kind:
            undo.enter_context(torch.device(self._device))


class no_fast_path(Scope):
    """Without torch's fused transformer kernels and compiled functions: they call no layer."""

    def change(self) -> None:
        _FAST_PATH.hold(self.undo, False)
        dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")  # if anything has been compiled
        if hasattr(dynamo, "DynamoStance"):
            # Under a counter, torch would give up compiling them for good.
            _COMPILING.hold(self.undo, dynamo.DynamoStance("force_eager"))


class exact_passes(no_fast_path):
    """Passes whose values depend neither on settings of the process nor on other threads' calls."""

    def change(self) -> None:
        super().change()
        _MATMUL_PRECISION.hold(self.undo, _FULL_PRECISION)


# Settings of the whole process ------------------------------------------------------------------


class Shared(Generic[Value]):
    """A setting of the whole process, which several threads may use at the same time.

    The first user's value is restored after the last one; a user inside another of the same
    thread, with no other thread about, restores what it found.
    """

    def __init__(self, get: Callable[[], Value], put: Callable[[Value], object]) -> None:
        self._get, self._put = get, put
        self._lock = threading.RLock()
        # By user: its thread and, if no other thread's user was there, the value it found.
        self._users: dict[ExitStack, tuple[int, list[Value]]] = {}
        self._before: list[Value] = []

    def hold(self, undo: ExitStack, value: Value | None = None) -> None:
        """Keep what is set now until `undo` is closed; with a value, that is set meanwhile."""
        thread = threading.get_ident()
        with self._lock:
            first = not self._users
            # All users that set a value set the same one: a later one finds nothing to restore.
            alone = value is None and all(other == thread for other, _ in self._users.values())
            found = [self._get()] if first or alone else []
            if first:
                self._before = [] if found[0] is value else found
            undo.callback(self._release, undo)
            self._users[undo] = thread, found
            if value is not None and first and self._before:
                self._put(value)

    def _release(self, user: ExitStack) -> None:
        with self._lock:
            thread, found = self._users.pop(user, (None, []))  # if an error came in between
            if not self._users:
                found = self._before
            elif any(other != thread for other, _ in self._users.values()):
                found = []
            for value in found:
                self._put(value)


_FAST_PATH = Shared(mha.get_fastpath_enabled, mha.set_fastpath_enabled)
_COMPILING: Shared[Any] = Shared(
    lambda: torch._dynamo.eval_frame._stance,
    lambda stance: torch._dynamo.eval_frame._set_stance(stance),
)


def _keep_random_state(models: Iterable[nn.Module], undo: ExitStack) -> None:
    """That of the processor and of every GPU that holds a parameter."""
    devices = {parameter.device for model in models for parameter in model.parameters()}
    for device in {torch.device("cpu"), *(d for d in devices if d.type == "cuda")}:
        _random_state(device).hold(undo)


@cache
def _random_state(device: torch.device) -> Shared[Tensor]:
    if device.type == "cpu":
        return Shared(torch.get_rng_state, torch.set_rng_state)
    put = partial(torch.cuda.set_rng_state, device=device)
    return Shared(partial(torch.cuda.get_rng_state, device), put)


# The setting of all backends, and since torch 2.9 that of each; None where torch has or knows none.
Precision = tuple[str | None, ...]
_MATMULS = [getattr(b, "matmul", None) for b in (torch.backends.cuda, torch.backends.mkldnn)]


def _matmul_precision() -> Precision:
    try:
        common = torch.get_float32_matmul_precision()
    except RuntimeError:  # the backends have been set to something else one by one
        common = None
    single = [getattr(backend, "fp32_precision", None) for backend in _MATMULS]
    full = common == "highest" and all(value in (None, "none", "ieee") for value in single)
    return _FULL_PRECISION if full else (common, *single)


def _set_matmul_precision(precision: Precision) -> None:
    common, *single = precision
    if common is not None:
        torch.set_float32_matmul_precision(common)
    for backend, value in zip(_MATMULS, single, strict=True):
        if value is not None and hasattr(backend, "fp32_precision"):
            setattr(backend, "fp32_precision", value)  # noqa: B010


_FULL_PRECISION: Precision = ("highest", "ieee", "ieee")
_MATMUL_PRECISION = Shared(_matmul_precision, _set_matmul_precision)
