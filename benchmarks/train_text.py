"""Train the transformer that ships in benchmarks/weights: python -m benchmarks.train_text."""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import trange

from benchmarks.support.text import docstrings
from benchmarks.support.transformer import TEXT_WEIGHTS, ByteTransformer, held_out_nats, nats

PEAK_RATE = 3e-3


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, round to float16, and write the weights."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_text", description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=TEXT_WEIGHTS)
    options = parser.parse_args(arguments)

    text = docstrings()
    torch.manual_seed(options.seed)
    model = train(ByteTransformer(), text.train, steps=options.steps, seed=options.seed)
    rounded = copy.deepcopy(model).half()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(rounded.state_dict(), options.out)
    megabytes = options.out.stat().st_size / 1e6
    print(
        f"docstrings: {held_out_nats(model, text):.3f} nats a byte on {len(text.val)} held-out "
        f"pieces, {held_out_nats(rounded.float(), text):.3f} as stored ({options.out}, "
        f"{megabytes:.2f} MB)"
    )


def train(
    model: nn.Module, tokens: Tensor, *, steps: int, seed: int, batch_size: int = 32
) -> nn.Module:
    """Train from scratch to predict the next byte; returns the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    model.train()
    order = torch.empty(0, dtype=torch.long)
    bar = trange(steps, desc="training", leave=False, disable=None)
    for _ in bar:
        if len(order) < batch_size:
            order = torch.randperm(len(tokens), generator=generator)
        batch, order = tokens[order[:batch_size]], order[batch_size:]
        loss = nats(model(batch), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"{loss.item():.3f} nats", refresh=False)
    return model.eval()


if __name__ == "__main__":
    main()
