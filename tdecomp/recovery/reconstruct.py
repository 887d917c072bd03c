"""A short training of each block to give the original block's outputs, without labels.

Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction",
section 3.2, which trains the rounding of weights.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from tdecomp.calibration.augment import Augment, flip_and_shift
from tdecomp.calibration.passes import Batches
from tdecomp.model.batches import Forward, device_of
from tdecomp.model.example import images_in_layout
from tdecomp.recovery.attempt import Attempt, errors_so_far, left_note
from tdecomp.recovery.block_training import BlockTraining
from tdecomp.recovery.blocks import Block, blocks_of
from tdecomp.recovery.held_out import HeldOut
from tdecomp.recovery.options import check_training
from tdecomp.recovery.quick_layout import take_channels_last
from tdecomp.recovery.recovery import Recovery, RecoveryStep, run_on_copy
from tdecomp.recovery.replaced import replaced_layers
from tdecomp.recovery.walk import Walk
from tdecomp.runtime.torch_state import evaluating, exact_passes, no_inference_mode

_SAMPLES = 1024  # that blocks are trained on, variants among them
_SEEN = 2560  # samples that the steps of a block see by default, and each of them at least once


@dataclass(frozen=True)
class Reconstruct(RecoveryStep):
    """`reconstruct` as a step of `decompose`, with its options `epochs` and `lr`.

    >>> Reconstruct(epochs=4)
    Reconstruct(epochs=4, lr=None)

    Parameters
    ----------
    epochs, lr
        As for `reconstruct`.

    Raises
    ------
    ValueError
        For a number of epochs below 1, and a rate that is not finite and above 0.
    """

    name: ClassVar[str] = "reconstruct"
    uses_variants: ClassVar[bool] = True

    epochs: int | None = None
    lr: float | None = None

    def __post_init__(self) -> None:
        check_training(self.name, self.lr, epochs=self.epochs)

    def run(
        self, model: nn.Module, original: nn.Module, batches: Batches, held_out: HeldOut
    ) -> Recovery:
        batches.require_several_passes("an error taken before and after")
        replaced = replaced_layers(model, original, self.name)
        attempt, device = Attempt(model, held_out), device_of(model)
        layers: dict[str, tuple[float, float]] = {}
        kept = 0
        with evaluating(model, original), exact_passes(), no_inference_mode(), torch.no_grad():
            walk = Walk.through(model, original, replaced, batches, device)
            blocks, notes = _blocks(walk)
            chains = [layer for block in blocks for layer in block.chains]
            items, short = walk.items(chains, device, _SAMPLES) if blocks else ([], None)
            notes += [short] if short else []
            if blocks and not walk.takes_turns(chains, items):
                notes.append("left as it was: its passes cannot wait for one another")
                blocks = []
            if blocks and take_channels_last(batches, [model, original], items[0].batch):
                items = [
                    replace(i, batch=images_in_layout(i.batch, "channels_last")) for i in items
                ]
            met = walk.meetings(
                {block: block.modules[0] for block in blocks},
                {block: block.originals[-1] for block in blocks},
                items, lambda args, kwargs: (args, kwargs),
            )  # fmt: skip
            samples = sum(item.samples for item in items if not item.held)
            epochs = self.epochs or max(1.0, _SEEN / max(samples, 1))
            so_far = partial(errors_so_far, layers)
            for block, calls in batches.progress.over(
                met, self.name, len(blocks), "blocks", so_far
            ):
                training = BlockTraining(block, calls, batches)
                *lost, better = training.train(epochs, self.lr, device)
                layers[block.name] = lost[0], lost[1]
                kept += not better
        notes += left_note(kept, len(layers), "blocks")
        return attempt.finish(self.name, layers, notes)


def _blocks(walk: Walk) -> tuple[list[Block], list[str]]:
    """The blocks that can be trained, and words about the others."""
    called = [layer for layer in walk.calls if walk.calls[layer]]
    found = blocks_of(walk.model, walk.original, called)
    once = [b for b in found if all(walk.calls[layer] == 1 for layer in b.chains)]
    able = [block for block in once if block.parameters()]
    notes = []
    if len(once) < len(found):
        notes.append(f"{len(found) - len(once)} blocks left as they were: called several times")
    if len(able) < len(once):
        words = "left as they were: no parameter requires gradients"
        notes.append(f"{len(once) - len(able)} blocks {words}")
    return able, notes


def reconstruct(
    model: nn.Module,
    original: nn.Module,
    batches: Any,
    *,
    epochs: int | None = None,
    lr: float | None = None,
    augment: Augment | None = flip_and_shift,
    forward: Forward | None = None,
    max_batches: int | None = None,
    inplace: bool = False,
    seed: int | None = None,
    progress: bool = True,
) -> Recovery:
    """Train each block of a decomposed model for a short while, without labels.

    >>> original = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> smaller = tdecomp.decompose(original, "svd", rank=2, progress=False).model
    >>> recovery = reconstruct(smaller, original, [torch.randn(512, 16)], progress=False)
    >>> recovery.error_after < recovery.error_before
    True

    A block is a module with up to four layers, such as a residual block, or a stretch of an
    `nn.Sequential`. In the order in which they run, each is trained by Adam, on the inputs that it
    gets in the decomposed model, to give the outputs of the original's block: unlike `refit`, this
    sees the activations in between. Weights are trained in coordinates in which their inputs vary
    alike in all directions (Desjardins et al. 2015, "Natural Neural Networks", section 3.1). All
    batches go through both models once. A block's training is kept only where it surely gains on
    samples that are held out.

    Parameters
    ----------
    model : nn.Module
        What `decompose` or `apply` made of `original`; `refit` before it gains little more.
    original : nn.Module
        The model before it was decomposed; it is left as it was.
    batches : list of batches, DataLoader or Data
        As for `tdecomp.calibrate`.
    epochs : int, optional
        How often each block goes through its inputs, 32 samples a step. By default as often as
        shows it about 2,560 samples, 1,024 of them different: variants count.
    lr : float, optional
        The highest rate of Adam, for weights whose coordinates are about 0.2; for others the rate
        is in proportion. By default each block's is found by a few steps whose rate rises (Smith
        2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3).
    augment : callable ``(batch, generator) -> batch``, optional
        As for `tdecomp.refit`.
    inplace : bool
        Change `model` itself, wholly or, on an error, not at all.
    forward, max_batches, seed, progress
        As for `tdecomp.calibrate`, and so are the errors raised.

    Returns
    -------
    Recovery
        Its `layers` are the blocks, by the name of their first module.

    Raises
    ------
    ValueError
        If the model was not decomposed from this original, or an option is out of range.
    """
    return run_on_copy(
        Reconstruct(epochs, lr), model, original, batches, inplace, forward=forward, seed=seed,
        max_batches=max_batches, augment=augment, progress=progress,
    )  # fmt: skip
