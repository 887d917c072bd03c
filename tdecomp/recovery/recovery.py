"""A step that gets accuracy back without labels, and what it reports."""

import math
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from tdecomp.calibration.opening import opened_for
from tdecomp.calibration.passes import Batches, batches_for
from tdecomp.model.surgery import adopt, copy_with
from tdecomp.recovery.held_out import HeldOut
from tdecomp.runtime.torch_state import restoring


@dataclass(frozen=True)
class Recovery:
    """The result of one step.

    >>> original = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> smaller = tdecomp.decompose(original, "svd", rank=2, progress=False).model
    >>> recovery = tdecomp.refit(smaller, original, [torch.randn(512, 16)], progress=False)
    >>> recovery.step, recovery.samples, recovery.error_after < recovery.error_before
    ('refit', 102, True)

    Errors are the share of the variance of the original model's outputs that is lost, on a few
    hundred samples that are held out; NaN without an original. A step of tdecomp that does not
    surely lower it leaves the model as it was.

    Attributes
    ----------
    model : nn.Module
        A copy, or the model that was given if it was changed in place.
    step : str
        The name of the step.
    error_before, error_after : float
        The error of the whole model, as above, before the step and after it.
    layers : dict of str to (float, float)
        For steps that go layer by layer, the share of each original output's variance that was
        lost before and after, weighted by how much the model's outputs depend on it.
    notes : tuple of str
        Remarks on what the step did.
    error_se, error_margin, gain_se : float or None
        The standard error of `error_after`, the half-width of its 95% confidence interval, and the
        standard error of the gain, `error_before - error_after`. None where the samples cannot
        tell.
    samples : int
        The number that are held out.
    """

    model: nn.Module
    step: str
    error_before: float
    error_after: float
    layers: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error_se: float | None = None
    error_margin: float | None = None
    gain_se: float | None = None
    samples: int = 0

    def __str__(self) -> str:
        errors = f": output error {self.error_before:.4g} → {self.error_after:.4g}"
        if self.error_margin is not None:
            errors += f" ± {self.error_margin:.2g} (95%, {self.samples} samples held out)"
        known = not math.isnan(self.error_before)
        return "; ".join((self.step + errors if known else self.step, *self.notes))

    def to_dict(self) -> dict[str, Any]:
        """All but the model as plain data for JSON; errors that are not known are None."""
        plain = {name: value for name, value in vars(self).items() if name != "model"}
        for name, value in plain.items():
            if isinstance(value, float) and not math.isfinite(value):
                plain[name] = None
        layers = {name: list(errors) for name, errors in self.layers.items()}
        return {**plain, "layers": layers, "notes": list(self.notes)}


class RecoveryStep(ABC):
    """One way of getting accuracy back; its fields are its options.

    >>> class Leave(RecoveryStep):
    ...     name = "leave"
    ...     def run(self, model, original, batches, held_out):
    ...         error = held_out.estimate(held_out.lost(model)).value
    ...         return Recovery(model, self.name, error, error)
    >>> layer, data = nn.Linear(16, 4), [torch.randn(64, 16)]
    >>> tdecomp.decompose(
    ...     layer, "svd", rank=2, data=data, recover=Leave(), progress=False
    ... ).report.recovery[0].step
    'leave'

    Attributes
    ----------
    name : str
        What `recover=` and reports call it.
    uses_variants : bool
        Whether it uses variants of the batches, so that fits before it should, too.
    """

    name: ClassVar[str]
    uses_variants: ClassVar[bool] = False

    @abstractmethod
    def run(
        self, model: nn.Module, original: nn.Module, batches: Batches, held_out: HeldOut
    ) -> Recovery:
        """Change the decomposed `model` itself; after an error it may be left half changed.

        `original` is left as it was; `held_out` takes the errors before and after.
        """


def run_on_copy(
    step: RecoveryStep, model: nn.Module, original: Any, batches: Any, inplace: bool, **options: Any
) -> Recovery:
    """Run a step on a copy; with `inplace`, `model` then takes the values of the copy.

    The original may be None for steps that need none; `options` are those of `batches_for`.
    """
    given = batches_for(step.name, batches, **options)
    models = [model] if original is None else [model, original]
    for got in models:
        if not isinstance(got, nn.Module):
            words = f"expected models (of a result, result.model), got {type(got).__name__}"
            raise TypeError(f"{step.name}: {words}")
    there = {name for name, _ in model.named_modules()}
    opening = nullcontext() if original is None else opened_for(original, names=there)
    with restoring(*models, seed=given.seed), opening:
        copy, given = copy_with(model, {}), given.taken_by(model)
        recovery = step.run(copy, original, given, HeldOut(original, given))
        return replace(recovery, model=adopt(model, copy)) if inplace else recovery
