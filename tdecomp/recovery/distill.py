"""A short fine-tuning against the original's outputs, without labels.

Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; with hints from inside the
network as in Romero et al. 2015, "FitNets", and images pasted together as in Yun et al. 2019,
"CutMix".
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from tdecomp.calibration.augment import Augment, flip_and_shift
from tdecomp.calibration.passes import Batches
from tdecomp.model.batches import Forward
from tdecomp.recovery.attempt import Attempt
from tdecomp.recovery.held_out import HeldOut
from tdecomp.recovery.options import check_training
from tdecomp.recovery.recovery import Recovery, RecoveryStep, run_on_copy
from tdecomp.recovery.training import Training, hinted
from tdecomp.runtime.torch_state import evaluating, exact_passes, no_inference_mode


@dataclass(frozen=True)
class Distill(RecoveryStep):
    """`distill` as a step of `decompose`, with its options `steps`, `lr` and `hints`.

    >>> Distill(steps=50)
    Distill(steps=50, lr=None, hints=True)

    Parameters
    ----------
    steps, lr, hints
        As for `distill`.

    Raises
    ------
    ValueError
        For a number of steps below 1, and a rate that is not finite and above 0.
    """

    name: ClassVar[str] = "distill"
    uses_variants: ClassVar[bool] = True

    steps: int | None = None
    lr: float | None = None
    hints: bool = True

    def __post_init__(self) -> None:
        check_training(self.name, self.lr, steps=self.steps)

    def run(
        self, model: nn.Module, original: nn.Module, batches: Batches, held_out: HeldOut
    ) -> Recovery:
        batches.require_several_passes("a training")
        trained = _trained(model)
        attempt = Attempt(model, held_out)
        # Only these: a forward pass may change buffers, which `evaluating` restores.
        best, best_error = [p.detach().clone() for p in trained], attempt.error.value
        notes: tuple[str, ...] = ()
        try:
            both = evaluating(model, original)
            with both, exact_passes(), no_inference_mode(), torch.enable_grad():
                hints = hinted(model) if self.hints else []
                training = Training(model, original, trained, batches, hints)
                for _ in training.stretches(self.steps, self.lr):
                    error = held_out.error(model)
                    if error < best_error:
                        best, best_error = [p.detach().clone() for p in trained], error
        except KeyboardInterrupt:
            notes = ("interrupted: the best model so far",)
        with torch.no_grad():
            for parameter, value in zip(trained, best, strict=True):
                parameter.copy_(value)
        model.zero_grad(set_to_none=True)
        return attempt.finish(self.name, notes=notes)


def distill(
    model: nn.Module,
    original: nn.Module,
    batches: Any,
    *,
    steps: int | None = None,
    lr: float | None = None,
    hints: bool = True,
    augment: Augment | None = flip_and_shift,
    forward: Forward | None = None,
    max_batches: int | None = None,
    inplace: bool = False,
    seed: int | None = None,
    progress: bool = True,
) -> Recovery:
    """Train a decomposed model for a short while to give the original's outputs.

    >>> original = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> smaller = tdecomp.decompose(original, "svd", rank=3, progress=False).model
    >>> recovery = distill(smaller, original, [torch.randn(512, 16)], steps=20, progress=False)
    >>> recovery.error_after < recovery.error_before
    True

    The loss is the squared distance to the original's outputs and, as hints, to those of a few
    blocks inside it, each as a share of its variance. Both models run in evaluation mode. Adam
    trains all parameters that require gradients; its rate rises over the first tenth of the steps
    and then falls to zero. The result is the model, of the given one and those on the way, with the
    lowest error on samples that are held out; a KeyboardInterrupt ends the training
    with the best one so far.

    Parameters
    ----------
    model : nn.Module
        What `decompose` or `apply` made of `original`, or any model with outputs of its shape.
    original : nn.Module
        The model before it was decomposed; it is left as it was.
    batches : list of batches, DataLoader or Data
        As for `tdecomp.calibrate`; gone through as often as needed.
    steps : int, optional
        Steps of one batch each. By default as many as take about the arithmetic of 66 training
        steps of the original, and at least 66: the smaller the model, the more.
    lr : float, optional
        The highest rate of Adam, for weights whose coordinates (as for `reconstruct`) are about
        0.2; for others the rate is in proportion. By default, up to 1e-3, the rate at which a step
        in a random direction changes the outputs by much less than their error.
    hints : bool
        Whether to compare outputs inside the models, too.
    augment : callable ``(batch, generator) -> batch``, optional
        Varies each batch; by default images are mirrored and shifted a little. Unless it is None,
        rectangles of images are exchanged between them, too. A `Data` has its own.
    inplace : bool
        Change `model` itself; on an error it is as it was.
    forward, max_batches, seed, progress
        As for `tdecomp.calibrate`, and so are the errors raised.

    Returns
    -------
    Recovery
        With the model, and its error before and after.

    Raises
    ------
    ValueError
        If the models' outputs differ in shape, nothing requires gradients, or the loss is NaN.
    """
    return run_on_copy(
        Distill(steps, lr, hints), model, original, batches, inplace, forward=forward, seed=seed,
        max_batches=max_batches, augment=augment, progress=progress,
    )  # fmt: skip


def _trained(model: nn.Module) -> list[nn.Parameter]:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(
            "distill: no parameter of the model requires gradients, so that nothing can be "
            "trained; expected some: model.requires_grad_(True)"
        )
    if any(p.dtype == torch.float16 for p in trained):
        raise ValueError(
            "distill: got parameters of float16, in which Adam's squared gradients vanish; "
            "expected float32 or bfloat16: distill model.float() and original.float(), then "
            "call half()"
        )
    return trained
