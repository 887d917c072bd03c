"""Global state."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Keep the caller's autocast, inference mode and default device out of a fit."""
    # A device context costs time on every operation: only where it changes anything.
    elsewhere = torch.get_default_device().type != device.type
    with (
        torch.autocast(device.type, enabled=False),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.device(device) if elsewhere else nullcontext(),
    ):
        yield


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's mode, the buffers and the random state restored after."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, _version(buffer), buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng([device.index for device in devices]):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for module, name, buffer, version, value in buffers:
                module._buffers[name] = buffer  # forward may have put another one in its place
                if _version(buffer) != version:
                    with torch.no_grad():
                        buffer.copy_(value)


def _version(buffer: Tensor) -> int:
    """How often it was changed in place; inference tensors cannot be, outside inference mode."""
    return 0 if buffer.is_inference() else buffer._version


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Without torch's fused transformer kernels, which call no layer and hide from its counter."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside, so that only activations are kept for it."""
    # Inference tensors take no gradient anyway, and could not be told to again.
    trained = [p for p in model.parameters() if p.requires_grad and not p.is_inference()]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Global random numbers from this seed inside, the caller's own ones after; None: as they are.

    A DataLoader that shuffles takes its order from them.
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
