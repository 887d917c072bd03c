"""What decomposing gives: the model, its report and its plan."""

import os
from dataclasses import dataclass

from torch import nn

from tdecomp import checkpoint
from tdecomp.plans.plan import Plan
from tdecomp.plans.report import Report


@dataclass(frozen=True)
class Decomposition:
    """The decomposed model, and what was done to each layer.

    >>> result = tdecomp.decompose(nn.Linear(64, 64), "svd", rank=8, progress=False)
    >>> result.report.after.params, tuple(result.model[0].weight.shape)
    (1088, (8, 64))

    Attributes
    ----------
    model : nn.Module
        A copy, or the model that was given if it was changed in place.
    report : Report
        What was done to each layer, and what it cost.
    plan : Plan
        The methods and ranks that the model has.
    """

    model: nn.Module
    report: Report
    plan: Plan

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the weights and the plan to one safetensors file; `tdecomp.load` reads it.

        >>> result.save("small.safetensors")  # doctest: +SKIP

        A ValueError is raised if the model was decomposed in several steps or its state dict holds
        something that is not a tensor, a FileNotFoundError if the file's folder does not exist.
        """
        checkpoint.save(file, self.model, self.plan)
