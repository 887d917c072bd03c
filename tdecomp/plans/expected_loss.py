"""What a plan is expected to lose, beside what no other choice could go below."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class ExpectedLoss:
    """The summed losses of what was chosen, and a lower bound on those of any choice.

    Both are of the candidates that `tdecomp.sensitivity` shows; a rank that was raised between
    them may lose less. The bound is that of the relaxed problem, in which choices may be mixed.
    """

    chosen: float
    bound: float

    def to_dict(self) -> dict[str, float]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return f"expected loss {self.chosen:.3g}, lower bound {self.bound:.3g}"
