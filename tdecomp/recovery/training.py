"""The training of a model to give the outputs of another one, and of a few modules inside it.

Romero et al. 2015, "FitNets: Hints for Thin Deep Nets".
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from tdecomp.calibration.augment import paste
from tdecomp.calibration.counted_rows import CountedRows
from tdecomp.calibration.passes import Batches
from tdecomp.layers.chain import Chain
from tdecomp.model.batches import copied, device_of, tensors_of
from tdecomp.model.example import images_in_layout
from tdecomp.model.macs import MacCounter
from tdecomp.recovery.adam import Adam, Coordinates
from tdecomp.recovery.quick_layout import take_channels_last
from tdecomp.recovery.whitening import bases_of
from tdecomp.runtime.torch_state import hooks

# The stretches of a training, after each of which the model may become the result.
_STRETCHES = 8
# The default number of steps: at least this many, and as many as take the arithmetic of this many
# training steps of the original, each with a backward pass that costs twice a forward pass.
_STEPS = 66
_SHOWN = 256  # samples by which the inputs of layers are known
# The largest number of hinted modules.
_HINTS = 4
_HINT_WEIGHT = 3.0
_HIGHEST_RATE = 1e-3
# One step at the highest rate may change the outputs by this share of their squared error.
_SHARE_OF_ERROR = 0.02


@dataclass(frozen=True, eq=False)
class Training:
    """Adam on the distance between two models' outputs, and between outputs inside them."""

    model: nn.Module
    original: nn.Module
    trained: list[nn.Parameter]  # those of `model`
    batches: Batches
    hints: Sequence[str]  # the names of the modules whose outputs are compared, too

    @cached_property
    def _first(self) -> Any:
        return next(self.batches.on(device_of(self.model)))

    def _coordinates(self, rows: CountedRows) -> Coordinates:
        given = self.batches.on(device_of(self.model))
        runs = ((batch, partial(self.batches.run, self.model, batch)) for batch in given)
        return Coordinates(self.trained, bases_of([self.model], self.trained, rows, runs, _SHOWN))

    def stretches(self, steps: int | None, lr: float | None) -> Iterator[None]:
        """Train, yielding after each of a few stretches; None for the default steps and rate."""
        steps = self._usual_steps() if steps is None else steps
        counted = CountedRows(self.batches)
        coordinates = self._coordinates(counted)
        lr = self._rate(coordinates) if lr is None else lr
        model, original, batches = self.model, self.original, self.batches
        optimizer = Adam.one_cycle(coordinates, lr, steps)
        device = device_of(model)
        endless = itertools.chain.from_iterable(batches.on(device) for _ in itertools.count())
        generator = batches.generator(0)
        stretch = max(1, steps // _STRETCHES)
        quick = take_channels_last(batches, [model, original], self._first)
        with (
            Outputs(model, self.hints) as mine,
            Outputs(original, self.hints) as wanted,
            batches.progress.step("distill", steps, "steps") as bar,
        ):
            for step in range(1, steps + 1):
                batch = variant(batches, next(endless), generator)
                batch = images_in_layout(batch, "channels_last") if quick else batch
                counted.begin(batch)
                with torch.no_grad():
                    targets = wanted.of(original, batches, batch)
                loss = _distance(mine.of(model, batches, batch), targets, counted)
                value = float(loss.detach())
                if not loss.requires_grad:
                    raise ValueError(
                        "distill: the model's outputs depend on no parameter that requires "
                        "gradients, so that nothing can be trained; expected some that do"
                    )
                if not math.isfinite(value):
                    raise ValueError(
                        f"distill: the loss is {value} after {step - 1} steps; expected a finite "
                        f"one: try a lower rate than lr={lr:g}, and look for NaN in the batches"
                    )
                optimizer.step(loss, device)
                bar.advance(f"loss {value:.3g}")
                if step % stretch == 0 or step == steps:
                    yield

    def _usual_steps(self) -> int:
        """A step costs a forward pass of the original, and a training step of the model."""
        macs = []
        for model in (self.model, self.original):
            with torch.no_grad(), MacCounter() as counter:
                self.batches.run(model, self._first)
            macs.append(counter.macs)
        share = macs[0] / macs[1] if macs[1] else 1.0
        return max(_STEPS, round(_STEPS * 3 / (1 + 3 * share)))

    def _rate(self, coordinates: Coordinates) -> float:
        """The highest rate at which one step changes the outputs by little of their error.

        A step of Adam is about as long as the rate in every entry. With random signs, the square
        of its effect on the outputs is in proportion to the square of the rate.
        """
        generator = self.batches.generator(0)
        batch = variant(self.batches, self._first, generator)
        with torch.no_grad():
            wanted = tensors_of(self.batches.run(self.original, batch))
            before = [z.clone() for z in tensors_of(self.batches.run(self.model, batch))]
            with coordinates.restored():
                for value in coordinates.values:
                    bits = torch.randint(0, 2, value.shape, generator=generator, device="cpu")
                    value.add_((2 * bits - 1).to(value), alpha=_HIGHEST_RATE)
                coordinates.write()
                moved = tensors_of(self.batches.run(self.model, batch))
            error, change = _squared_distance(before, wanted), _squared_distance(moved, before)
        share = error / change if change > 0 else 1.0
        return _HIGHEST_RATE * min(1.0, math.sqrt(_SHARE_OF_ERROR * share))


def variant(batches: Batches, batch: Any, generator: torch.Generator) -> Any:
    """The batch varied by `augment`, if there is one, and with parts of its images exchanged."""
    augment = batches.data.augment
    return batch if augment is None else paste(augment(copied(batch), generator), generator)


def _squared_distance(a: list[Tensor], b: list[Tensor]) -> float:
    """The sum over all entries of all tensors."""
    return sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True))


def _distance(
    mine: dict[str | int, Tensor], wanted: dict[str | int, Tensor], counted: CountedRows
) -> Tensor:
    """The sum over outputs and hints of the squared distance, as a share of the variance."""
    terms = []
    for name, target in wanted.items():
        if name in mine and mine[name].shape == target.shape:
            found, target = counted.of_output(mine[name]), counted.of_output(target)
            weight = _HINT_WEIGHT if isinstance(name, str) else 1.0
            share = (found - target).square().mean() / target.var(unbiased=False).clamp_min(1e-12)
            terms.append(weight * share)
    return torch.stack(terms).sum()


def hinted(model: nn.Module) -> list[str]:
    """The names of a few blocks that hold chains, evenly spread, whose outputs are compared.

    A chain itself is not compared: norm and activation come between its output and the input of
    the next layer.
    """

    def blocks(name: str) -> list[str]:
        return [
            f"{name}.{child}" if name else child
            for child, module in model.get_submodule(name).named_children()
            if not isinstance(module, Chain) and any(isinstance(m, Chain) for m in module.modules())
        ]

    names = blocks("")
    while len(names) == 1 and blocks(names[0]):
        names = blocks(names[0])
    if len(names) <= _HINTS:
        return names
    return [names[round(i * (len(names) - 1) / (_HINTS - 1))] for i in range(_HINTS)]


class Outputs(hooks):
    """Inside: the outputs of a model and, as hints, of some modules in it."""

    def __init__(self, model: nn.Module, hints: Sequence[str]) -> None:
        self._found: dict[str | int, Tensor] = {}
        super().__init__(
            partial(module.register_forward_hook, partial(self._take, name))
            for name, module in model.named_modules()
            if name in hints
        )

    def of(self, model: nn.Module, batches: Batches, batch: Any) -> dict[str | int, Tensor]:
        """The outputs of one call by position, and those of the hinted modules by name."""
        self._found = {}
        outputs = tensors_of(batches.run(model, batch))
        return {**self._found, **dict(enumerate(outputs))}

    def _take(self, name: str, _: Any, __: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            self._found[name] = output.clone()  # the next module may change it in place
