"""A short fine-tuning against the original's outputs, without labels.

Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; with hints from inside the
network as in Romero et al. 2015, "FitNets", and images pasted together as in Yun et al. 2019,
"CutMix".
"""

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from tdecomp.calibration.augment import Augment, flip_and_shift, paste
from tdecomp.model.batches import BatchError, Batches, Forward, channels_last, device_of, tensors_of
from tdecomp.recovery.base import Recovery, Yardstick, adopt, batches_for, both_untouched, copy_of
from tdecomp.recovery.hints import Outputs, hinted

# Checks of the whole model's error on the way, each of which may become the result.
_CHECKS = 8
# By default at least so many steps, and as many as cost what so many training steps of the
# original would: with backward passes, which cost twice a forward pass.
_STEPS = 150
_HINT_WEIGHT = 3.0
_WARM_UP = 0.1
_YARDSTICK_SEED = 1
# Root mean square of the entries for which the rate is taken as it is.
_USUAL_SIZE = 0.2
_MAX_GRADIENT_NORM = 1.0
_HIGHEST_RATE = 1e-3
# Of the squared error of the outputs, what one step at the highest rate may change them by.
_PART_OF_THE_ERROR = 0.02


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
    progress: bool = True,
) -> Recovery:
    """Train a decomposed model for a short while to give the original's outputs.

    >>> original = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> smaller = tdecomp.decompose(original, "svd", rank=3, progress=False).model
    >>> recovery = distill(smaller, original, [torch.randn(64, 16)], steps=20, progress=False)
    >>> recovery.error_after < recovery.error_before
    True

    The loss is the squared distance to the original's outputs and, as hints, to those of a few
    layers or blocks on the way, each as a share of its variance. Both models run in evaluation
    mode (batch norm statistics stay, dropout is off); Adam trains all parameters that require
    gradients, its rate rising over the first tenth of the steps and falling to zero. The model
    that lost least on variants of the first few hundred samples is kept, the one handed in
    included; an interrupt (KeyboardInterrupt) ends the training with the best so far.

    Parameters
    ----------
    model : nn.Module
        What `decompose` or `apply` made, or any model with the original's outputs.
    original : nn.Module
    batches : iterable of batches
        As for `tdecomp.calibrate`; a list or a DataLoader, gone through as often as needed.
    steps : int, optional
        One batch each. By default as many as take about the arithmetic of 150 training steps of
        the original, and at least 150: the smaller the model, the more of them.
    lr : float, optional
        The highest rate of Adam, for parameters with entries of about 0.2 and more; where they are
        smaller so is the rate. By default as much, up to 1e-3, as keeps what a step of it in a
        random direction does to the outputs well below what is wrong with them.
    hints : bool
        Whether to compare outputs inside the models, too.
    augment : callable ``(batch, generator) -> batch``, optional
        Varies each batch; by default images are mirrored and shifted a little, all else stays.
        Unless it is None, rectangles of images are exchanged between them, too.
    forward, max_batches
        As for `tdecomp.calibrate`.
    inplace : bool
        Change `model` itself; on an error it is as it was.
    progress : bool
        Show a bar over the steps.

    Returns
    -------
    Recovery

    Raises
    ------
    ValueError
        If the outputs of the two models differ in shape, if nothing requires gradients, if the
        loss becomes NaN, and as `tdecomp.calibrate`.
    """
    counted = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1
    if steps is not None and not counted:
        raise ValueError(f"distill: expected steps of at least 1, got {steps!r}")
    known = isinstance(lr, (int, float)) and not isinstance(lr, bool)
    if lr is not None and not (known and 0 < lr < math.inf):
        raise ValueError(f"distill: expected a finite rate above 0, got lr={lr!r}")
    source = batches_for("distill", batches, forward, max_batches)
    source.again("a training")
    changed = copy_of(model)
    vary = None if augment is None else _pasted_after(augment)
    # Other variants than those of the training, but the same ones each time.
    generator = torch.Generator("cpu").manual_seed(_YARDSTICK_SEED)
    yardstick = Yardstick(
        original, source, None if vary is None else lambda batch: vary(batch, generator)
    )
    before = yardstick.lost_by(changed)
    trained = [p for p in changed.parameters() if p.requires_grad]
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
    best, best_error = copy.deepcopy(changed.state_dict()), before
    notes: tuple[str, ...] = ()
    try:
        with both_untouched(changed, original), torch.inference_mode(False), torch.enable_grad():
            names = hinted(changed) if hints else []
            first = next(source.on(device_of(changed)))
            if steps is None:
                steps = _usual_steps(changed, original, source, first)
            training = _training(
                changed, original, trained, source, first, steps, lr, names, vary, progress
            )
            for _ in training:
                error = yardstick.lost_by(changed)
                if error < best_error:
                    best, best_error = copy.deepcopy(changed.state_dict()), error
    except KeyboardInterrupt:
        notes = ("interrupted: the best model so far",)
    changed.load_state_dict(best)
    changed.zero_grad(set_to_none=True)
    changed = adopt(model, changed) if inplace else changed
    return Recovery(changed, "distill", before, best_error, {}, notes)


def _pasted_after(augment: Augment) -> Augment:
    return lambda batch, generator: paste(augment(batch, generator), generator)


def _training(
    model: nn.Module,
    original: nn.Module,
    trained: list[nn.Parameter],
    batches: Batches,
    first: Any,
    steps: int,
    lr: float | None,
    hints: Sequence[str],
    vary: Augment | None,
    progress: bool,
) -> Iterator[None]:
    """Train, pausing after each of a few stretches."""
    # Adam's steps are as long for small entries as for large ones: the rate is in proportion.
    sizes = [min(1.0, _size(parameter) / _USUAL_SIZE) for parameter in trained]
    if lr is None:
        lr = _rate(model, original, trained, sizes, batches, first, vary)
    rates = [lr * size for size in sizes]
    optimizer = torch.optim.Adam([{"params": [parameter]} for parameter in trained], lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=max(steps, 2), pct_start=_WARM_UP
    )
    device = device_of(model)
    endless = itertools.chain.from_iterable(batches.on(device) for _ in itertools.count())
    generator = torch.Generator("cpu").manual_seed(0)
    pause = max(1, steps // _CHECKS)
    quick = _take_channels_last((model, original), batches, channels_last(first))
    with Outputs(model, hints) as mine, Outputs(original, hints) as wanted:
        bar = tqdm(range(1, steps + 1), desc="distill", unit="step", disable=not progress)
        for step in bar:
            batch = next(endless)
            if vary is not None:
                batch = vary(batch, generator)
            if quick:
                batch = channels_last(batch)
            with torch.no_grad():
                targets = wanted.of(original, batches, batch)
            loss = _distance(mine.of(model, batches, batch), targets)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise ValueError(
                    f"distill: the loss is {value} after {step - 1} steps; expected a finite "
                    f"one: try a lower rate than lr={lr:g}, and look for NaN in the batches"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, _MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            bar.set_postfix_str(f"loss {value:.4g}", refresh=False)
            if step % pause == 0 or step == steps:
                yield


def _usual_steps(model: nn.Module, original: nn.Module, batches: Batches, batch: Any) -> int:
    """A step costs a forward pass of the original, and of the model a training step."""
    flops = []
    for each in (model, original):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            batches.run(each, batch)
        flops.append(counter.get_total_flops())
    share = flops[0] / flops[1] if flops[1] else 1.0
    return max(_STEPS, round(_STEPS * 3 / (1 + 3 * share)))


def _take_channels_last(models: Sequence[nn.Module], batches: Batches, batch: Any) -> bool:
    try:
        for model in models:
            with torch.no_grad():
                batches.run(model, batch)
    except BatchError:
        return False
    return True


def _rate(
    model: nn.Module,
    original: nn.Module,
    trained: Sequence[nn.Parameter],
    sizes: Sequence[float],
    batches: Batches,
    batch: Any,
    vary: Augment | None,
) -> float:
    """The highest rate at which a step is a small part of what is left to be learnt.

    A step of Adam is about as long as the rate in every entry. What it does to the outputs, if the
    signs are random, goes with the square of the rate.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    if vary is not None:
        batch = vary(batch, generator)
    with torch.no_grad():
        wanted = tensors_of(batches.run(original, batch))
        before = [z.clone() for z in tensors_of(batches.run(model, batch))]
        held = [parameter.detach().clone() for parameter in trained]
        for parameter, size in zip(trained, sizes, strict=True):
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.add_(signs.to(parameter), alpha=_HIGHEST_RATE * size)
        moved = tensors_of(batches.run(model, batch))
        for parameter, value in zip(trained, held, strict=True):
            parameter.copy_(value)
        wrong, done = _squares(before, wanted), _squares(moved, before)
    share = wrong / done if done > 0 else 1.0
    return _HIGHEST_RATE * min(1.0, math.sqrt(_PART_OF_THE_ERROR * share))


def _squares(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True))


def _size(parameter: nn.Parameter) -> float:
    """The root mean square of its entries; of one that is zero so far, the usual."""
    size = float(parameter.detach().double().square().mean().sqrt())
    return size if size > 0 else _USUAL_SIZE


def _distance(mine: dict[str | int, Tensor], wanted: dict[str | int, Tensor]) -> Tensor:
    """The sum over outputs and hints of the squared distance, as a share of the variance."""
    terms = [
        (_HINT_WEIGHT if isinstance(name, str) else 1.0)
        * (mine[name] - target).square().mean()
        / target.var(unbiased=False).clamp_min(1e-12)
        for name, target in wanted.items()
        if name in mine and mine[name].shape == target.shape
    ]
    return torch.stack(terms).sum()
