"""Calls that are cut short at random moments, and what must hold of everything afterwards."""

import random
import sys
import threading
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from functools import partial

import torch

from tdecomp.runtime.torch_state import evaluating
from tests.calls import CASES
from tests.injections import Alarm, AtLine, press
from tests.unchanged import changes

ERRORS = (RuntimeError, MemoryError, KeyboardInterrupt)


def interrupt(name, times, seed=0):
    """Cut one of CASES short so many times; how often nothing was changed, all was, or it went on.

    An AssertionError says after which interrupt or error something was half done.
    """
    case, draw, counts = CASES[name], random.Random(f"{name} {seed}"), Counter()
    with case.with_threads(), warnings.catch_warnings(), lost_in_callbacks():
        # So it goes on after an error in a pass for gradients.
        warnings.filterwarnings("ignore", "calibrate: no gradients can be taken")
        whole, lines, seconds = _undisturbed(case)
        s = case.subject()
        for _ in range(times):
            error, block = _injection(draw, lines, seconds)
            kept, before = s.state()
            raised = None
            try:
                with block:
                    case.call(s)
            except BaseException as caught:
                raised = caught
            what = f"{name}: {error.__name__} by {block}, raised {raised!r}"
            # A ValueError is an error that was put in words.
            assert raised is None or isinstance(raised, (error, ValueError)), what
            kept_now, now = s.state()
            assert not changes(kept, kept_now), f"{what}: {changes(kept, kept_now)} changed"
            assert _is_free(s.model), f"{what}: other threads wait for the model for ever"
            changed = [changes(a, b) for a, b in zip(before, now, strict=True)]
            if any(changed):
                # An error that was taken in may have led to other values, one at the end has not.
                exact = raised is not None and not case.trains
                other = changes(whole[exact], _outcome(s, exact))
                assert not other, f"{what}: half changed: {changed}; other than whole: {other}"
                s = case.subject()
            counts["changed" if any(changed) else "unchanged" if raised else "went on"] += 1
        case.call(s)
        assert not changes(whole[True], _outcome(s, True)), f"{name} works no longer as before"
    return counts


@contextmanager
def lost_in_callbacks():
    """Python only prints an error that comes in a callback of its own, as of a weak reference."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda lost: None if issubclass(lost.exc_type, ERRORS) else before(lost)
    try:
        yield
    finally:
        sys.unraisablehook = before


def _undisturbed(case):
    """What a whole call leaves, with values and without; how often it runs each line; its time."""
    lines, seconds = {}, []
    for errors in (False, True):
        s = case.subject()
        with AtLine(None, 0, press, errors) as block:
            case.call(s)
        lines[errors] = block.hits
    for _ in range(2):
        s = case.subject()
        start = time.perf_counter()
        case.call(s)
        seconds.append(time.perf_counter() - start)
    return {values: _outcome(s, values) for values in (True, False)}, lines, min(seconds)


def _injection(draw, lines, seconds):
    """An error, and a block in which it is raised at a random moment."""
    kind = draw.choice(["timer", "twice", "signal", "error"])
    if kind in ("timer", "twice"):
        interval = draw.uniform(1e-4, 0.02) if kind == "twice" else 0.0
        return KeyboardInterrupt, Alarm(draw.uniform(0, seconds), interval)
    error = draw.choice(ERRORS) if kind == "error" else KeyboardInterrupt
    action = press if kind == "signal" else partial(_fail, error)
    line, hits = draw.choice(list(lines[kind == "error"].items()))
    return error, AtLine(line, draw.randint(1, hits), action, kind == "error")


def _fail(error):
    raise error("injected")


def _outcome(s, values):
    """What a call left, without identities and, unless wanted, without the tensors' values."""
    parameters = s.model.named_parameters(remove_duplicate=False)
    tensors = dict([*parameters, *s.model.named_buffers(remove_duplicate=False)])
    names = {id(tensor): name for name, tensor in tensors.items()}

    def shown(value):
        tensor = isinstance(value, torch.Tensor)
        return value.detach().clone() if tensor and values else value.shape if tensor else value

    def optimized(optimizer):
        groups = [
            (*(names[id(p)] for p in group["params"]), *group.get("param_names", ()))
            for group in optimizer.param_groups
        ]
        state = {
            names[id(p)]: {key: shown(value) for key, value in mine.items()}
            for p, mine in optimizer.state.items()
        }
        return (*groups, state)

    return {
        "modules": tuple(
            (name, type(m).__name__, m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in s.model.named_modules(remove_duplicate=False)
        ),
        "tensors": {n: (t.requires_grad, t.grad is None, shown(t)) for n, t in tensors.items()},
        "optimizers": tuple(map(optimized, s.optimizers)),
    }


def _is_free(model):
    """Whether another thread can use the model."""

    def use():
        with evaluating(model):
            pass

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(10)
    return not thread.is_alive()
