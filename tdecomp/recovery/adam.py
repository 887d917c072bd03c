"""Adam with steps that suit trained weights, of layers whose inputs may be whitened."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler, OneCycleLR

from tdecomp.recovery.whitening import Basis

# The share of the steps over which the rate rises.
_WARM_UP = 0.1
# The root mean square of a parameter's entries that the rate is meant for.
_USUAL_SIZE = 0.2
_MAX_GRADIENT_NORM = 1.0


class Coordinates:
    """What is trained in the place of parameters: `values`, for which one rate suits all.

    They are coordinates where there is a basis, and of about the same size, as Adam's steps are as
    long for small entries as for large ones.
    """

    def __init__(
        self, trained: Sequence[nn.Parameter], bases: Mapping[nn.Parameter, Basis]
    ) -> None:
        self.parameters, self._bases = trained, bases
        self.values: list[Tensor] = []
        self._sizes: list[float] = []
        for parameter in trained:
            value = parameter.detach()
            if parameter in bases:
                value = bases[parameter].inwards(value)
            size = float(value.double().square().mean().sqrt()) / _USUAL_SIZE
            # Biases may be large beside what they change; no step is longer than the rate there.
            size = size if parameter in bases else min(1.0, size)
            self._sizes.append(size if size > 0 else 1.0)
            self.values.append(value / self._sizes[-1])

    def take_gradients(self) -> None:
        """Give the values the gradients of the parameters."""
        for parameter, value, size in zip(self.parameters, self.values, self._sizes, strict=True):
            slope = parameter.grad
            if slope is not None:
                basis = self._bases.get(parameter)
                value.grad = size * (slope if basis is None else basis.slope(slope))

    def write(self) -> None:
        """Give the parameters what the values stand for."""
        for parameter, value, size in zip(self.parameters, self.values, self._sizes, strict=True):
            basis, given = self._bases.get(parameter), size * value
            parameter.detach().copy_(given if basis is None else basis.outwards(given))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the values may be changed; afterwards they and the parameters are as before."""
        changed = [*self.values, *(parameter.detach() for parameter in self.parameters)]
        held = [tensor.clone() for tensor in changed]
        try:
            yield
        finally:
            for tensor, before in zip(changed, held, strict=True):
                tensor.copy_(before)


class Adam:
    """Adam, on coordinates of parameters."""

    def __init__(
        self, coordinates: Coordinates, lr: float, schedule: Callable[[Optimizer], LRScheduler]
    ) -> None:
        self._coordinates, self._begun = coordinates, False
        # Together, as most of the time for small parameters goes to Python itself.
        self._adam = torch.optim.Adam(coordinates.values, lr=lr, foreach=True)
        self._schedule = schedule(self._adam)

    @classmethod
    def one_cycle(cls, coordinates: Coordinates, lr: float, steps: int) -> "Adam":
        """The rate rises to `lr` over the first tenth of the steps and then falls to zero."""
        total = max(steps, 2)
        # OneCycleLR divides by the length of the warm-up, 0 if it is exactly the first step.
        warm_up = 0.99 * _WARM_UP if _WARM_UP * total == 1 else _WARM_UP
        schedule = partial(OneCycleLR, max_lr=lr, total_steps=total, pct_start=warm_up)
        return cls(coordinates, lr, schedule)

    @classmethod
    def rising(cls, coordinates: Coordinates, lr: float, factor: float) -> "Adam":
        """The rate begins with `lr`, and each step multiplies it."""
        return cls(coordinates, lr, partial(ExponentialLR, gamma=factor))

    def step(self, loss: Tensor, device: torch.device) -> None:
        """A step against the gradients of this loss, which are not kept."""
        parameters = self._coordinates.parameters
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT_NORM)
        self._coordinates.take_gradients()
        # The first step makes counters, in some releases on the default device.
        with nullcontext() if self._begun else torch.device(device):
            self._adam.step()
        self._begun = True
        self._schedule.step()
        self._coordinates.write()
