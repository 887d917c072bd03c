"""Small networks drawn at random, each with as many inputs of its own as are asked for."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, pairwise

import torch
from torch import Tensor, nn

KINDS = ("perceptron", "convolutions", "attention")


@dataclass(frozen=True)
class Drawn:
    """A network, and how inputs for it are drawn."""

    kind: str
    network: nn.Module
    inputs: Callable[[int], Tensor]  # so many new ones


class Attention(nn.Module):
    """One block of a transformer, of which every position is an output."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        update: Tensor = self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return x + update


def drawn(kind: str, seed: int) -> Drawn:
    """A network of random widths and depth, on inputs of a random spectrum."""
    draw = torch.Generator().manual_seed(seed)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "perceptron":
            widths = [between(16, 128) for _ in range(between(3, 5))]
            layers = [[nn.Linear(a, b), nn.ReLU()] for a, b in pairwise(widths)]
            network: nn.Module = nn.Sequential(*chain(*layers))[:-1]
            shape: tuple[int, ...] = (widths[0],)
        elif kind == "convolutions":
            widths = [3, *(between(8, 32) for _ in range(between(2, 3)))]
            blocks = [
                [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.AvgPool2d(2)]
                for a, b in pairwise(widths)
            ]
            side = 16 // 2 ** len(blocks)
            head = nn.Linear(widths[-1] * side * side, 10)
            network = nn.Sequential(*chain(*blocks), nn.Flatten(), head)
            shape = (3, 16, 16)
        else:
            width, length = 16 * between(2, 4), between(4, 12)
            network = nn.Sequential(Attention(width, 2), nn.Linear(width, between(4, 32)))
            shape = (length, width)
    features = math.prod(shape)
    decay = 1.5 * float(torch.rand(1, generator=draw))
    sizes = torch.arange(1, features + 1).float().pow(-decay)
    sizes /= sizes.square().mean().sqrt()
    mixing = torch.linalg.qr(torch.randn(features, features, generator=draw)).Q * sizes

    def inputs(count: int) -> Tensor:
        x: Tensor = torch.randn(count, features, generator=draw) @ mixing.T
        return x.reshape(count, *shape)

    if kind == "convolutions":  # the statistics of norms are those of the inputs
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = None
        with torch.no_grad():
            network(inputs(512))
    return Drawn(kind, network.eval(), inputs)
