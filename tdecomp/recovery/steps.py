"""Getting accuracy back without labels: each way alone, or several as steps of `decompose`."""

from dataclasses import dataclass, replace

from torch import nn

from tdecomp.calibration.data import Source
from tdecomp.recovery.base import Recovery, chains_not_in
from tdecomp.recovery.batchnorm import recalibrate_batchnorm
from tdecomp.recovery.distill import distill
from tdecomp.recovery.refit import refit

# A refitted chain gives what the layer gave, which the old statistics are those of; only what is
# still missing is for new ones to make up for.
_ORDER = ("refit", "recalibrate_batchnorm", "distill")
_NOTHING = "no layer was decomposed"


@dataclass(frozen=True)
class Steps:
    """Which of them to take: the refit first, the fine-tuning last."""

    recalibrate_batchnorm: bool = False
    refit: bool = False
    distill: bool = False

    def __bool__(self) -> bool:
        return self.recalibrate_batchnorm or self.refit or self.distill

    def take(self, source: Source) -> Source:
        """The data as these steps use it; what they cannot be taken with is refused at once.

        What is refitted or distilled is meant for more than these batches, all else for just them.
        """
        for name in _ORDER:
            if getattr(self, name):
                source.batches(name).again(name)
        return source if self.refit or self.distill else replace(source, augment=None)

    def run(self, model: nn.Module, original: nn.Module, source: Source) -> tuple[Recovery, ...]:
        """Take the steps on `model` itself."""
        if not chains_not_in(original, model):
            names = [name for name in _ORDER if getattr(self, name)]
            return tuple(Recovery(model, n, 0.0, 0.0, {}, (_NOTHING,)) for n in names)
        done: list[Recovery] = []
        common = {
            "forward": source.forward,
            "max_batches": source.max_batches,
            "inplace": True,
            "progress": source.progress,
        }
        varied = {**common, "augment": source.augment}
        if self.refit:
            done.append(refit(model, original, source.data, **varied))  # type: ignore[arg-type]
        if self.recalibrate_batchnorm:
            done.append(
                recalibrate_batchnorm(model, source.data, original=original, **common)  # type: ignore[arg-type]
            )
        if self.distill:
            done.append(distill(model, original, source.data, **varied))  # type: ignore[arg-type]
        return tuple(done)


__all__ = ["Recovery", "Steps", "distill", "recalibrate_batchnorm", "refit"]
