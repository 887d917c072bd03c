"""One line of a comparison: a method with a rank, and how both are written on a command line."""

from dataclasses import dataclass
from typing import Any

import tdecomp

LINEAR_METHOD = "svd"
GROUPS = ("auto", "dense")  # several methods each, Linear layers' included
BUDGET = "budget"
RANK_SYNTAX = (
    "a float for a share of the MACs (0.5), an int for a rank (32), a pair for Tucker-2 (32,48), "
    "vbmf, vbmf:WEAKEN, breakeven, energy:SHARE, or budget:SHARE for one budget of the model's MACs"
)


@dataclass(frozen=True)
class Setting:
    """A convolution's method and the rank as it was written; Linear layers are left to SVD.

    With `data` the fits are to what the layers see, with `refit` they are made once more, in the
    order of the network.
    """

    method: str
    rank: str
    data: bool = False
    refit: bool = False

    @property
    def label(self) -> str:
        return f"{self.method} {self.rank}{self.suffix}"

    @property
    def suffix(self) -> str:
        """What the name of the method does not say."""
        return " + data" * self.data + " + refit" * self.refit

    @property
    def methods(self) -> str | list[str]:
        """What to pass to tdecomp: the method for convolutions, then the one for Linear layers."""
        alone = self.method == LINEAR_METHOD or self.method in GROUPS
        return self.method if alone else [self.method, LINEAR_METHOD]


def parse_rank(text: str) -> Any:
    """Turn a rank as written on a command line into what tdecomp takes."""
    name, _, argument = text.partition(":")
    try:
        if name == BUDGET:
            return tdecomp.Budget(macs=float(argument))
        if name == "energy":
            return tdecomp.Energy(float(argument))
        if name == "vbmf":
            return tdecomp.VBMF(weaken=float(argument)) if argument else "vbmf"
        if text == "breakeven":
            return text
        if "," in text:
            return tuple(int(part) for part in text.split(","))
        if text.lstrip("+-").isdecimal():
            return int(text)
        return tdecomp.Ratio(float(text), of="macs")
    except ValueError as error:
        raise ValueError(f"rank {text!r}: expected {RANK_SYNTAX} ({error})") from error
