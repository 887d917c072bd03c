"""What was done to each layer, and to the model afterwards."""

from collections.abc import Mapping, Sequence
from typing import Any

from tdecomp.decomposers.base import Decomposer
from tdecomp.layers.cost import Cost
from tdecomp.plans.row import Row
from tdecomp.plans.table import Table
from tdecomp.timing.speed import Speed


class Report(Table):
    """What `apply` did, layer by layer.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> report = tdecomp.decompose(model, "svd", rank=8, exclude="2", progress=False).report
    >>> report.before.params, report.after.params, report["2"].reason
    (4290, 1218, "excluded by '2'")

    Attributes
    ----------
    rows : tuple of Row
        One for each weight of two or more dimensions.
    everything_else : Cost
        Parameters and MACs of all that is no row; the same before and after.
    decomposers : mapping of str to Decomposer
        The methods that the rows name, with their options.
    recovery : tuple of Recovery
        What the steps after the fit did to the error of the whole model.
    speed : Speed or None
        The whole model's time against the original's, where it was measured.
    notes : tuple of str
        What the summary says of the data.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        everything_else: Cost,
        decomposers: Mapping[str, Decomposer],
        recovery: Sequence[Any] = (),
        speed: Speed | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__(rows, everything_else, decomposers, speed, notes)
        self.recovery = tuple(recovery)

    def _facts(self) -> list[str]:
        return [*super()._facts(), *map(str, self.recovery)]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, with the results of the recovery steps."""
        return {**super().to_dict(), "recovery": [step.to_dict() for step in self.recovery]}
