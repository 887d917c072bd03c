"""A change of a model that stays only where samples gain by it that it was not fitted to."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from tdecomp.calibration.estimate import helps, paired_gain
from tdecomp.model.surgery import swap, tensors_in
from tdecomp.recovery.held_out import HeldOut
from tdecomp.recovery.recovery import Recovery


class Attempt:
    """Made before a model is changed; `finish` takes the change back unless it surely helps."""

    def __init__(self, model: nn.Module, held_out: HeldOut) -> None:
        self._model, self._held_out = model, held_out
        self._lost = held_out.lost(model)
        self.error = held_out.estimate(self._lost)  # before the change
        self._values = {
            name: tensor.detach().clone()
            for name, tensor in tensors_in(model).items()
            if tensor.is_floating_point() or tensor.dtype == torch.int64  # steps change no others
        }

    def finish(
        self,
        step: str,
        layers: Mapping[str, tuple[float, float]] | None = None,
        notes: Sequence[str] = (),
    ) -> Recovery:
        """What the step `step` did; the model is as it was if its gain may be chance."""
        held_out, before, layers = self._held_out, self._lost, dict(layers or {})
        after, said = held_out.lost(self._model), [*notes]
        first, last = self.error, held_out.estimate(after)
        gain, gain_se = paired_gain(before, after)
        better = helps(before, after, held_out=held_out.samples > 0)
        if held_out.tells and not better and not torch.equal(before, after):
            swap(self._model, {}, values=self._values)
            layers = {name: (error, error) for name, (error, _) in layers.items()}
            said.append(
                f"left as it was: {first.value:.4g} → {last.value:.4g} is no sure gain"
                + (_remedy(gain, gain_se) if held_out.samples else "")
            )
            last, gain, gain_se = first, 0.0, 0.0
        if held_out.tells and not held_out.samples:
            said.append("nothing was held out: errors are of what was fitted to")
        if held_out.samples == 1:
            said.append(
                "a single sample is held out, by which no gain is sure: more samples, or "
                "held_out=0 to trust those that are fitted to, let a step change the model"
            )
        if not held_out.steady:
            said.append(
                "batches differ from pass to pass: errors are too low if these are other samples"
            )
        told = held_out.samples > 1
        known = abs(first.value - last.value) * gain_se / abs(gain) if gain else 0.0
        return Recovery(
            self._model, step, first.value, last.value, layers, tuple(said), last.se, last.margin,
            known if told else None, held_out.samples,
        )  # fmt: skip


def errors_so_far(layers: Mapping[str, tuple[float, float]]) -> str:
    """The errors of the parts of a model that are done, before and after, on average."""
    before, after = (sum(errors) / len(layers) for errors in zip(*layers.values(), strict=True))
    return f"error {before:.3g} → {after:.3g}"


def left_note(left: int, count: int, parts: str) -> list[str]:
    """What is said where some of the parts of a model are not changed, as this does not help."""
    return [f"{left} of {count} {parts} left as they were: no gain that is sure"] if left else []


def _remedy(gain: float, gain_se: float) -> str:
    """How much data would tell a gain from chance, if it is one."""
    if not 0 < gain < gain_se < math.inf:
        return ""
    return f": {math.ceil((gain_se / gain) ** 2)} times as much data may tell"
