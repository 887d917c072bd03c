"""The same objects with the same values: what "as it was" means for a model and an optimizer."""

import random
import signal
import threading
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _frozen(value):
    """Something to compare: tensors by identity and value, containers by their items."""
    if isinstance(value, nn.parameter.UninitializedParameter):
        return ("uninitialized", id(value))
    if isinstance(value, torch.Tensor):
        grad = None if not value.is_leaf or value.grad is None else value.grad.clone()
        values = value.detach().clone()
        return ("tensor", id(value), value.requires_grad, value.stride(), values, grad)
    if isinstance(value, nn.Module):
        return ("module", id(value))
    if isinstance(value, dict):
        return {k if isinstance(k, str) else id(k): _frozen(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(_frozen, value))
    plain = isinstance(value, (bool, int, float, complex, str, type(None)))
    return value if plain else (type(value).__name__, id(value))


def same_state(a, b):
    """Whether two states are the same, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.is_meta and b.is_meta:
            return (a.shape, a.dtype) == (b.shape, b.dtype)
        return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same_state, a, b))
    return type(a) is type(b) and a == b


def state_of(thing):
    """All that a model, an optimizer or a list of batches holds, by identity and by value."""
    if isinstance(thing, torch.optim.Optimizer):
        return {
            "groups": (id(thing.param_groups), *map(_frozen, thing.param_groups)),
            "group ids": tuple(id(group) for group in thing.param_groups),
            "state": {id(p): _frozen(state) for p, state in thing.state.items()},
            "attributes": {
                name: _frozen(value)
                for name, value in vars(thing).items()
                if name in ("_params", "_numel_cache")
            },
        }
    if not isinstance(thing, nn.Module):
        return {"items": _frozen(thing)}
    state = {}
    for name, module in thing.named_modules(remove_duplicate=False):
        own = {k: v for k, v in vars(module).items() if k not in _HOOKS}
        hooks = {k: tuple(getattr(module, k).values()) for k in _HOOKS}
        state[name] = (id(module), type(module).__name__, _frozen(own), hooks)
    return state


def global_state():
    """Every setting of torch and of the process that this library changes for a while."""
    hooks = nn.modules.module
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "default device": torch.get_default_device(),
        "matmul precision": (
            torch.get_float32_matmul_precision(),
            *(
                getattr(b.matmul, "fp32_precision", None)
                for b in (torch.backends.cuda, torch.backends.mkldnn)
            ),
        ),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
        ),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "threads": torch.get_num_threads(),
        "threads of new threads": _in_a_new_thread(torch.get_num_threads),
        "random state": torch.get_rng_state().numpy().tobytes(),
        "other random states": (random.getstate(), *map(str, np.random.get_state())),  # noqa: NPY002
        "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "global hooks": (len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)),
        "handler": signal.getsignal(signal.SIGINT),
    }


def _in_a_new_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def changes(then, now):
    """The keys under which two states differ."""
    return [k for k in {**then, **now} if not same_state(then.get(k), now.get(k))]


@contextmanager
def unchanged(*things):
    """Fail if a model or an optimizer is not as it was, object for object and bit for bit."""
    before = [state_of(thing) for thing in things]
    yield
    for thing, then in zip(things, before, strict=True):
        changed = changes(then, state_of(thing))
        assert not changed, f"{type(thing).__name__} changed in {changed}"


@contextmanager
def all_unchanged(*things):
    """Fail if these things, or any setting of torch or the process, are not as they were."""
    before = global_state()
    with unchanged(*things):
        yield
    after = global_state()
    assert {k: v for k, v in after.items() if v != before[k]} == {}
