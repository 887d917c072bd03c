"""A layer's row, and the table of rows that people look at."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tdecomp.layers.cost import Cost
from tdecomp.plans.row import Row
from tdecomp.plans.table import Table
from tdecomp.timing.speed import Speed

if TYPE_CHECKING:
    pass


class Report(Table):
    """What `apply` did, layer by layer.

    Attributes
    ----------
    recovery : tuple of Recovery
        What the steps after it did to the error of the whole model.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        everything_else: Cost,
        recovery: Sequence[Any] = (),
        speed: Speed | None = None,
    ) -> None:
        super().__init__(rows, everything_else, speed)
        self.recovery = tuple(recovery)

    def summary(self) -> str:
        """One line: how many layers, parameters and MACs, and what was done afterwards."""
        return "; ".join((super().summary(), *map(str, self.recovery)))
