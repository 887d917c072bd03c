"""Training each block for a few steps to give the original block's outputs.

Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction",
section 3.2, for chains in place of rounded weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tdecomp.calibration.augment import Augment, flip_and_shift
from tdecomp.calibration.counted_rows import CountedRows
from tdecomp.calibration.data import Batches
from tdecomp.calibration.estimate import is_sure
from tdecomp.model.batches import Forward, copied, count_samples, device_of, in_parts, tensors_of
from tdecomp.recovery.attempt import Attempt
from tdecomp.recovery.blocks import Block, blocks_of
from tdecomp.recovery.held_out import HeldOut
from tdecomp.recovery.lockstep import Passes, meetings
from tdecomp.recovery.recovery import Recovery, RecoveryStep, run_on_copy
from tdecomp.recovery.replaced import replaced_layers
from tdecomp.recovery.training import Adam
from tdecomp.recovery.walk import Item, Walk
from tdecomp.torch_state import evaluating, exact_passes, no_inference_mode

# The samples of a step.
_SAMPLES = 64
_TINY = 1e-30


@dataclass(frozen=True)
class Reconstruct(RecoveryStep):
    """`reconstruct` as a step of `decompose`, with its options `epochs` and `lr`.

    >>> Reconstruct(epochs=4)
    Reconstruct(epochs=4, lr=0.002)

    A ValueError refuses a number of epochs below 1, and a rate that is not finite and above 0.
    """

    name: ClassVar[str] = "reconstruct"
    uses_variants: ClassVar[bool] = True

    epochs: int = 8
    lr: float = 2e-3

    def __post_init__(self) -> None:
        if not (type(self.epochs) is int and self.epochs >= 1):
            raise ValueError(f"reconstruct: expected epochs of at least 1, got {self.epochs!r}")
        number = isinstance(self.lr, (int, float)) and not isinstance(self.lr, bool)
        if not (number and 0 < self.lr < math.inf):
            raise ValueError(f"reconstruct: expected a finite rate above 0, got lr={self.lr!r}")

    def run(
        self, model: nn.Module, original: nn.Module, batches: Batches, held_out: HeldOut
    ) -> Recovery:
        batches.require_several_passes(self.name)
        attempt = Attempt(model, held_out)
        notes: list[str] = []
        layers: dict[str, tuple[float, float]] = {}
        device = device_of(model)
        with evaluating(model, original), exact_passes(), no_inference_mode(), torch.no_grad():
            replaced = replaced_layers(model, original, self.name)
            walk = Walk.through(model, original, replaced, batches, device)
            chains = [layer for layer in replaced if walk.calls[layer]]
            found = blocks_of(model, original, chains)
            blocks = [
                b for b in found if b.parameters() and max(walk.calls[c] for c in b.chains) == 1
            ]
            if len(blocks) < len(found):
                notes.append(
                    f"{len(found) - len(blocks)} of {len(found)} blocks left as they were: called "
                    "several times, or without a parameter that requires gradients"
                )
            whole = walk.items(chains, device) if blocks else []
            items = [
                Item(part, item.held, item.number)
                for item in whole
                for part in in_parts(item.batch, _SAMPLES, count_samples(item.batch))
            ]
            if blocks and not walk.takes_turns(chains, whole):
                notes.append("left as it was: passes of this model cannot take turns")
                blocks = []
            kept = 0
            if blocks:
                order = {layer: at for at, layer in enumerate(walk.calls)}
                blocks.sort(key=lambda b: min(order[layer] for layer in b.chains))
                given = [item.batch for item in items]
                with (
                    Passes(
                        walk.runs(model, given), {b: b.modules[0] for b in blocks}, before=True,
                        pick=lambda args, kwargs: (args, kwargs),
                    ) as mine,
                    Passes(
                        walk.runs(original, given), {b: b.originals[-1] for b in blocks},
                        before=False,
                    ) as theirs,
                ):  # fmt: skip
                    met = meetings(mine, theirs, blocks)
                    hidden = not batches.progress
                    for block, calls in tqdm(
                        met, "reconstruct", len(blocks), unit="block", disable=hidden
                    ):
                        task = _Task(block, [(items[n], x, y) for n, x, y in calls], batches)
                        *lost, better = task.train(self.epochs, self.lr, device)
                        layers[block.name] = lost[0], lost[1]
                        kept += not better
            if kept:
                notes.append(
                    f"{kept} of {len(layers)} blocks left as they were: no gain that is sure"
                )
        return attempt.finish(self.name, layers, notes)


class _Task:
    """What a block gets in the calls of all batches, and what the original's gives."""

    def __init__(
        self, block: Block, calls: Sequence[tuple[Item, Any, Any]], batches: Batches
    ) -> None:
        self._block, self._rows = block, CountedRows(batches)
        self._calls = [(item, x, [y.clone() for y in tensors_of(out)]) for item, x, out in calls]
        self._fits = [call for call in self._calls if not call[0].held]
        held = [call for call in self._calls if call[0].held]
        self._held_out = bool(held)
        self._judges = held or self._fits
        self._generator = batches.generator(0)
        self._scales = [
            1.0 / max(float(torch.cat([y.flatten() for y in ys]).var(unbiased=False)), _TINY)
            for ys in zip(*(targets for _, _, targets in self._fits), strict=False)
        ]

    def train(self, epochs: int, lr: float, device: torch.device) -> tuple[float, float, bool]:
        """Train the block; the lost shares of its outputs before and after, and if it is kept."""
        trained = self._block.parameters()
        values = [p.detach().clone() for p in trained]
        steps = epochs * len(self._fits)
        before = self._errors()
        if not steps or not math.isfinite(float(before.sum())) or not float(before.sum()) > 0:
            return float(before.mean()), float(before.mean()), False
        optimizer = Adam(trained, lr, steps)
        with torch.enable_grad():
            for _ in range(epochs):
                order = torch.randperm(len(self._fits), generator=self._generator, device="cpu")
                for at in order.tolist():
                    optimizer.step(self._distance(*self._fits[at]).mean(), device)
        for parameter in trained:
            parameter.grad = None
        after = self._errors()
        better = is_sure(before, after) if self._held_out else bool(after.sum() < before.sum())
        if not better:
            for parameter, value in zip(trained, values, strict=True):
                parameter.copy_(value)
        return float(before.mean()), float((after if better else before).mean()), better

    def _errors(self) -> Tensor:
        return torch.cat([self._distance(*call).detach().double().cpu() for call in self._judges])

    def _distance(self, item: Item, given: Any, targets: Sequence[Tensor]) -> Tensor:
        """The mean squared distance of each sample's outputs, as a share of the variance."""
        args, kwargs = copied(given)
        self._rows.begin(item.batch)
        total: Tensor | None = None
        outputs = tensors_of(self._block(args, kwargs))
        for z, y, scale in zip(outputs, targets, self._scales, strict=False):
            gaps = scale * (z - y).square()
            mask = self._rows.mask_of_output(gaps)
            if mask is not None:
                gaps = gaps * mask.reshape(*mask.shape, *[1] * (gaps.dim() - mask.dim()))
            each = gaps.flatten(1).mean(dim=1) if gaps.dim() > 1 else gaps
            total = each if total is None else total + each
        assert total is not None
        return total


def reconstruct(
    model: nn.Module,
    original: nn.Module,
    batches: Any,
    *,
    epochs: int = Reconstruct.epochs,
    lr: float = Reconstruct.lr,
    augment: Augment | None = flip_and_shift,
    forward: Forward | None = None,
    max_batches: int | None = None,
    inplace: bool = False,
    seed: int | None = None,
    progress: bool = True,
) -> Recovery:
    """Train each block of a decomposed model for a few steps, without labels.

    >>> original = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> smaller = tdecomp.decompose(original, "svd", rank=3, progress=False).model
    >>> recovery = reconstruct(smaller, original, [torch.randn(512, 16)], progress=False)
    >>> recovery.error_after < recovery.error_before
    True
    """
    return run_on_copy(
        Reconstruct(epochs, lr), model, original, batches, inplace, forward=forward, seed=seed,
        max_batches=max_batches, augment=augment, progress=progress,
    )  # fmt: skip
