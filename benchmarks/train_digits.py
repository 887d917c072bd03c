"""Train the digits network that ships in benchmarks/weights: python -m benchmarks.train_digits."""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import trange

from benchmarks.support.data import Split, digits
from benchmarks.support.models import DIGITS_WEIGHTS
from benchmarks.support.networks import DigitsVGG
from benchmarks.support.training import accuracy

PEAK_RATE = 2e-3


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, round to float16, and write the weights."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_digits", description=__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DIGITS_WEIGHTS)
    options = parser.parse_args(arguments)

    data = digits()
    torch.manual_seed(options.seed)
    model = train(DigitsVGG(data.classes), data.train, epochs=options.epochs, seed=options.seed)
    rounded = copy.deepcopy(model).half()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(rounded.state_dict(), options.out)
    megabytes = options.out.stat().st_size / 1e6
    print(
        f"{data.title}: {accuracy(model, data.val):.2%} on {len(data.val)} held-out images, "
        f"{accuracy(rounded.float(), data.val):.2%} as stored ({options.out}, {megabytes:.2f} MB)"
    )


def train(
    model: nn.Module, split: Split, *, epochs: int, seed: int, batch_size: int = 64
) -> nn.Module:
    """Train from scratch on digits shifted by up to a pixel; returns the model in eval mode.

    The weight decay is strong so that in so few steps the weights lose the noise they started
    with, whose flat spectrum no low rank fits.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=1.5)
    steps = len(split) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps * epochs)
    model.train()
    for epoch in trange(epochs, desc="training", leave=False, disable=None):
        for x, y in split.shuffled(batch_size, steps, seed=seed + epoch):
            optimizer.zero_grad(set_to_none=True)
            loss = functional.cross_entropy(model(shifted(x, generator)), y, label_smoothing=0.05)
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by up to one pixel either way, repeating its border."""
    side = x.shape[-1]
    padded = functional.pad(x, (1, 1, 1, 1), mode="replicate")
    top, left = torch.randint(3, (2, len(x)), generator=generator)
    rows = top[:, None, None] + torch.arange(side)[:, None]
    columns = left[:, None, None] + torch.arange(side)
    image = torch.arange(len(x))[:, None, None]
    return padded[image, :, rows, columns].permute(0, 3, 1, 2)


if __name__ == "__main__":
    main()
