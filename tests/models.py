"""One table of small models that every test of a whole model uses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tdecomp.model.example import Example


class Cnn(nn.Module):
    """Strided, grouped, depthwise, transposed and pointwise convolutions, and a Linear."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 24, 3, stride=2, padding=1),
            nn.Conv2d(24, 24, 3, padding=1, groups=2),
            nn.Conv2d(24, 24, 3, padding=1, groups=24),
            nn.Conv2d(24, 32, 1),
            nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
            nn.Dropout(0.5),
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


class Attention(nn.Module):
    """A Linear before and after a MultiheadAttention."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(24, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 16)

    def forward(self, x):
        x = self.embed(x)
        return self.head(self.attention(x, x, x)[0])


class Twice(nn.Module):
    """One Linear under two names, called three times."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.again = self.first

    def forward(self, x):
        return self.again(torch.relu(self.first(torch.relu(self.first(x)))))


class Nested(nn.Module):
    """Layers in a ModuleList, a ModuleDict and each other."""

    def __init__(self):
        super().__init__()
        self.stem = nn.ModuleList([nn.Conv1d(8, 16, 3), nn.Conv1d(16, 16, 3)])
        self.heads = nn.ModuleDict(
            {"a": nn.Linear(16, 12), "b": nn.Sequential(nn.ReLU(), nn.Linear(16, 12))}
        )

    def forward(self, x):
        for layer in self.stem:
            x = layer(x)
        x = x.mean(2)
        return self.heads["a"](x) + self.heads["b"](x)


class TwoInputs(nn.Module):
    """Takes two arguments, by position or by keyword."""

    def __init__(self):
        super().__init__()
        self.left = nn.Linear(12, 16)
        self.right = nn.Linear(20, 16)

    def forward(self, left, right, scale=1.0):
        return scale * self.left(left) + self.right(right)


def _two_inputs(batch):
    return torch.randn(batch, 12), torch.randn(batch, 20)


@dataclass(frozen=True)
class Case:
    """A model, and example inputs of a given batch size."""

    model: Callable[[], nn.Module]
    example_inputs: Callable[[int], Any]

    def build(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.model()

    def inputs(self, batch=2):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return self.example_inputs(batch)


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.Sequential(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 12)
    )


MODELS = {
    "cnn": Case(Cnn, lambda batch: torch.randn(batch, 3, 8, 8)),
    "attention": Case(Attention, lambda batch: torch.randn(batch, 5, 24)),
    "encoder": Case(encoder, lambda batch: torch.randn(batch, 5, 16)),
    "twice": Case(Twice, lambda batch: torch.randn(batch, 16)),
    "nested": Case(Nested, lambda batch: torch.randn(batch, 8, 9)),
    "tuple": Case(TwoInputs, _two_inputs),
    "dict": Case(
        TwoInputs,
        lambda batch: dict(zip(("right", "left"), reversed(_two_inputs(batch)), strict=True)),
    ),
    "linear": Case(lambda: nn.Linear(16, 12), lambda batch: torch.randn(batch, 16)),
    "conv": Case(lambda: nn.Conv2d(8, 12, 3), lambda batch: torch.randn(batch, 8, 6, 6)),
}
# The methods that have something to do in every one of these models.
METHODS = ("lowrank", "svd")


def torch_macs(model, example_inputs):
    """Torch's own count in eval mode, without the fused kernels that hide from it."""
    return torch_count(model, example_inputs).get_total_flops() // 2


def torch_count(model, example_inputs):
    """Torch's counter after such a call; it has the count of each module, too."""
    fast, training = torch.backends.mha.get_fastpath_enabled(), model.training
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            Example(example_inputs).copied().run(model.eval())
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        model.train(training)
    return counter
