"""What refitting costs on a deep network of Linear layers, in plain forward passes.

    python -m benchmarks.sequential

The blocks are a transformer's: attention over the sequence, then two Linear layers, with weights
and inputs whose spectra fall off.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import tdecomp


class Block(nn.Module):
    """Pre-norm attention and a feed-forward part, six Linear layers in all."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) to the same."""
        y = self.norms[0](x)
        parts = (part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                 for part in (self.query, self.key, self.value))  # fmt: skip
        seen = nn.functional.scaled_dot_product_attention(*parts)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        y = nn.functional.gelu(self.up(self.norms[1](x)))
        output: Tensor = x + self.down(y)
        return output


def network(width: int, depth: int, seed: int) -> nn.Module:
    """A stack of blocks, the singular values of whose weights fall off."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(*(Block(width, width // 64) for _ in range(depth)))
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
                falling = torch.arange(1, len(s) + 1) ** -0.5
                scale = s.norm() / falling.norm()
                layer.weight.data = (u * (scale * falling)) @ vh
    return model.eval().requires_grad_(False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m benchmarks.sequential` with these command-line arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sequential", description=__doc__)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=6, help="blocks of six Linear layers")
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--macs", type=float, default=0.5, help="of the whole network")
    options = parser.parse_args(arguments)
    model = network(options.width, options.depth, seed=0)
    generator = torch.Generator().manual_seed(1)
    falling = torch.arange(1, options.width + 1) ** -0.5
    inputs, fresh = (
        torch.randn(options.sequences, 32, options.width, generator=generator) * falling
        for _ in range(2)
    )
    batches = list(inputs.split(options.batch))

    @torch.inference_mode()
    def passed() -> float:
        start = time.perf_counter()
        for batch in batches:
            model(batch)
        return time.perf_counter() - start

    result = tdecomp.decompose(
        model, "svd", rank=tdecomp.Budget(macs=options.macs), example_inputs=inputs[:1],
        data=batches, progress=False,
    )  # fmt: skip
    passed()
    passes = [passed()]
    start = time.perf_counter()
    recovery = tdecomp.refit(result.model, model, batches, progress=False)
    seconds = time.perf_counter() - start
    passes.append(passed())
    print(recovery)
    with torch.inference_mode():
        wanted = torch.cat([model(x) for x in fresh.split(options.batch)])
        power = (wanted - wanted.mean(0)).square().sum()
        for name, one in (("before", result.model), ("after", recovery.model)):
            got = torch.cat([one(x) for x in fresh.split(options.batch)])
            print(f"{name}: {float((got - wanted).square().sum() / power):.4f} on fresh inputs")
    print(f"refit: {seconds / statistics.mean(passes):.1f} passes ({seconds:.1f} s)")


if __name__ == "__main__":
    main()
