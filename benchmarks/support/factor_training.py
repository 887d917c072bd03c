"""Fine-tuning with labels by plain Adam, at a rate, a schedule and a kind of weight decay."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional

import tdecomp
from benchmarks.support.data import Split

CONSTANT, ONE_CYCLE = "constant", "one-cycle"
_WARM_UP = 0.3  # of the steps, torch's default
_AT_THE_END = 20  # the steps over which the last loss is a mean


@dataclass(frozen=True)
class Training:
    """How a network is fine-tuned."""

    rate: float
    schedule: str = CONSTANT
    decay: str = "none"
    strength: float = 0.0  # of the weight decay
    steps: int = 200
    batch_size: int = 128


@dataclass(frozen=True)
class Losses:
    """The cross-entropy of each step, without the weight decay."""

    of_steps: tuple[float, ...]

    @property
    def last(self) -> float:
        """The mean over the last steps."""
        return fmean(self.of_steps[-_AT_THE_END:])

    @property
    def largest(self) -> float:
        """Infinite where a loss was not finite."""
        return max(loss if math.isfinite(loss) else math.inf for loss in self.of_steps)


@dataclass(frozen=True)
class Judged:
    """What a network is worth on images that it was not trained on."""

    accuracy: float
    loss: float


@torch.inference_mode()
def judge(model: nn.Module, split: Split, batch_size: int = 256) -> Judged:
    """The share that the model labels right, and its mean cross-entropy, in eval mode."""
    model.eval()
    right = loss = 0.0
    for x, y in split.in_order(batch_size):
        logits = model(x)
        right += float((logits.argmax(1) == y).sum())
        loss += float(functional.cross_entropy(logits, y, reduction="sum"))
    return Judged(right / len(split), loss / len(split))


def train(model: nn.Module, split: Split, training: Training, seed: int = 0) -> Losses:
    """Train the model in place, and leave it in eval mode.

    No gradient is clipped and no image is changed. The same seed gives the same batches.
    """
    # Nothing but the time depends on it: on a CPU depthwise convolutions take half as long.
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), lr=training.rate)
    rate_at = torch.optim.lr_scheduler.LambdaLR(optimizer, SCHEDULES[training.schedule](training))
    penalty, losses = DECAYS[training.decay], []
    for x, y in split.shuffled(training.batch_size, training.steps, seed):
        optimizer.zero_grad(set_to_none=True)
        x = x.contiguous(memory_format=torch.channels_last)
        loss = functional.cross_entropy(model(x), y)
        (loss + penalty(model, training.strength)).backward()
        optimizer.step()
        rate_at.step()
        losses.append(loss.item())
    model.eval()
    return Losses(tuple(losses))


def _one_cycle(training: Training) -> Callable[[int], float]:
    """Up from a twenty-fifth of the rate and down to none by cosines, as torch's `OneCycleLR`."""
    top = _WARM_UP * training.steps

    def share(step: int) -> float:
        if step < top:
            return 0.04 + 0.96 * (1 - math.cos(math.pi * step / top)) / 2
        return (1 + math.cos(math.pi * (step - top) / (training.steps - top))) / 2

    return share


SCHEDULES: Mapping[str, Callable[[Training], Callable[[int], float]]] = {
    CONSTANT: lambda _: lambda _step: 1.0,
    ONE_CYCLE: _one_cycle,
}


def _no_decay(model: nn.Module, strength: float) -> Tensor:
    del model, strength
    return torch.zeros(())


def _on_factors(model: nn.Module, strength: float) -> Tensor:
    """Half the strength times the squared norm of every factor; of every weight without chains."""
    chains: list[nn.Module] = [m for m in model.modules() if isinstance(m, tdecomp.Chain)]
    weights = [p for part in chains or [model] for p in part.parameters() if p.dim() > 1]
    return strength / 2 * torch.stack([weight.square().sum() for weight in weights]).sum()


def _on_products(model: nn.Module, strength: float) -> Tensor:
    """`tdecomp.factor_decay`; of a network without chains its weights are the products."""
    if not any(isinstance(module, tdecomp.Chain) for module in model.modules()):
        return _on_factors(model, strength)
    return tdecomp.factor_decay(model, strength)


DECAYS: Mapping[str, Callable[[nn.Module, float], Tensor]] = {
    "none": _no_decay,
    "factors": _on_factors,
    "product": _on_products,
}
