"""The steps of `decompose` that get accuracy back, in the order given."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from tdecomp.calibration.moments import Moments
from tdecomp.calibration.passes import Batches
from tdecomp.recovery.batchnorm import RecalibrateBatchnorm
from tdecomp.recovery.distill import Distill
from tdecomp.recovery.held_out import HeldOut
from tdecomp.recovery.reconstruct import Reconstruct
from tdecomp.recovery.recovery import Recovery, RecoveryStep
from tdecomp.recovery.refit import Refit
from tdecomp.recovery.replaced import new_chains

_STEPS: dict[str, type[RecoveryStep]] = {
    step.name: step for step in (Refit, Reconstruct, RecalibrateBatchnorm, Distill)
}

# What a user may give as `recover`.
Recover = None | str | RecoveryStep | Sequence[str | RecoveryStep]


def recovery_steps(recover: Recover) -> tuple[RecoveryStep, ...]:
    """The steps that a user gave as names and objects, in the order given."""
    if recover is None:
        return ()
    given = recover if isinstance(recover, (list, tuple)) else [recover]
    return tuple(_step(one) for one in given)


def _step(given: Any) -> RecoveryStep:
    if isinstance(given, RecoveryStep):
        return given
    names = ", ".join(map(repr, _STEPS))
    classes = ", ".join(step.__name__ for step in _STEPS.values())
    expected = f"expected {names}, or one of {classes} with options, e.g. Distill(steps=50)"
    if not isinstance(given, str):
        hint = " (a class: make an instance of it)" if isinstance(given, type) else ""
        raise TypeError(f"recover: got {given!r}{hint}; {expected}")
    if given not in _STEPS:
        raise ValueError(f"recover: unknown step {given!r}; {expected}")
    return _STEPS[given]()


def check_data(steps: Sequence[RecoveryStep], data: Batches | Moments | None) -> None:
    """Raise a ValueError for data that the steps cannot use, before any work is done."""
    for step in steps:
        if not isinstance(data, Batches):
            got = "none" if data is None else "moments"
            raise ValueError(
                f"recover: {step.name} runs the model on batches, got {got}; expected data= to be "
                "a DataLoader or a list of batches"
            )
        data.called_by("recover").require_several_passes(step.name)


def use_variants(steps: Sequence[RecoveryStep]) -> bool:
    """Whether the fits before these steps should use variants of the batches, too."""
    return any(step.uses_variants for step in steps)


def run_steps(
    steps: Sequence[RecoveryStep],
    model: nn.Module,
    original: nn.Module,
    data: Batches | Moments | None,
) -> tuple[Recovery, ...]:
    """Run the steps on `model` itself; after an error it may be left half changed."""
    if not steps:
        return ()
    assert isinstance(data, Batches)  # see `check_data`
    if not new_chains(model, original):
        nothing = ("no layer was decomposed",)
        return tuple(Recovery(model, step.name, 0.0, 0.0, {}, nothing) for step in steps)
    data = data.taken_by(model)
    held_out = HeldOut(original, data.called_by("recover"))  # the original runs once for all steps
    return tuple(step.run(model, original, data.called_by(step.name), held_out) for step in steps)
