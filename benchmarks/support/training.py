"""Accuracy, and a short fine-tuning with labels."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from benchmarks.support.data import Split

LEARNING_RATE = 1e-3
MAX_GRADIENT_NORM = 1.0


@torch.inference_mode()
def accuracy(model: nn.Module, split: Split, *, batch_size: int = 256) -> float:
    """Return the share of the split that the model labels right, in eval mode."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in split.in_order(batch_size))
    return right / len(split)


def fine_tune(
    model: nn.Module,
    split: Split,
    *,
    steps: int,
    batch_size: int,
    seed: int = 0,
    learning_rate: float = LEARNING_RATE,
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
    title: str = "fine-tuning",
    progress: bool = False,
) -> None:
    """Train the model in place by Adam on a cosine schedule, and leave it in eval mode.

    The same seed gives every model the same batches in the same order.
    """
    torch.manual_seed(seed)  # dropout draws from the global generator
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(steps, 1))
    batches = split.shuffled(batch_size, steps, seed)
    quiet = None if progress else True  # None: only where there is no terminal
    for x, y in tqdm(batches, desc=title, total=steps, leave=False, disable=quiet):
        optimizer.zero_grad(set_to_none=True)
        loss(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
    model.eval()
