"""The same objects with the same values: what "as it was" means for a model and an optimizer."""

import signal
import threading
from contextlib import contextmanager

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
    """All that a model or an optimizer holds, by identity and by value."""
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
        "matmul precision": torch.get_float32_matmul_precision(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "threads": torch.get_num_threads(),
        "threads of new threads": _in_a_new_thread(torch.get_num_threads),
        "random state": torch.get_rng_state().tolist(),
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


@contextmanager
def unchanged(*things):
    """Fail if a model or an optimizer is not as it was, object for object and bit for bit."""
    before = [state_of(thing) for thing in things]
    yield
    for thing, then in zip(things, before, strict=True):
        now = state_of(thing)
        changed = [k for k in {**then, **now} if not same_state(then.get(k), now.get(k))]
        assert not changed, f"{type(thing).__name__} changed in {changed}"
