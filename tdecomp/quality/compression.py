"""What a search for the smallest share came to: the model, and all that was tried."""

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tdecomp.loss_curves.columns import filled_columns
from tdecomp.pictures.style import needs_matplotlib
from tdecomp.quality.quality import Verdict
from tdecomp.result import Decomposition

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNITS = {"macs": "MACs", "params": "parameters", "latency": "time"}


@dataclass(frozen=True)
class Trial:
    """A size that was tried."""

    share: float  # that was asked for
    reached: float  # of the result, at most that; of times, as measured
    verdict: Verdict
    seconds: float  # to plan, fit, recover and evaluate it


@dataclass(frozen=True)
class Compression(Decomposition):
    """The smallest model found that keeps the quality, and what was tried on the way.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> x = torch.randn(256, 64)
    >>> y = model(x).detach()
    >>> quality = Quality(lambda m: -((m(x) - y).square().mean() / y.var()).item(), drop=0.1)
    >>> found = tdecomp.compress_to(model, quality, "svd", data=[x], progress=False)
    >>> found.share == found.chosen.reached, found.evaluations <= 10
    (True, True)

    `str()` is a table of the trials and a summary. Where none of them keeps the quality, the model
    is a copy of the original, `share` is 1, and the summary says which came closest.

    Attributes
    ----------
    model, report, plan
        As of every `Decomposition`.
    trials : tuple of Trial
        The largest share first.
    original : tuple of float
        The metric's values of the original.
    allowed : float
        What may be lost of their mean.
    of : str
        What shares are of: "macs", "params" or "latency".
    """

    trials: tuple[Trial, ...]
    original: tuple[float, ...]
    allowed: float
    of: str

    @property
    def limit(self) -> float:
        """The lowest value that will do."""
        return fmean(self.original) - self.allowed

    @property
    def chosen(self) -> Trial | None:
        """The trial that gave the model; None if none of them keeps the quality."""
        kept = [t for t in self.trials if t.verdict.kept and t.reached < 1]  # times may be longer
        return kept[-1] if kept else None

    @property
    def share(self) -> float:
        """What the model has of the original's MACs, parameters or time."""
        return 1.0 if self.chosen is None else self.chosen.reached

    @property
    def evaluations(self) -> int:
        """How often the metric was evaluated, the original's included."""
        return len(self.original) + sum(len(trial.verdict.values) for trial in self.trials)

    def __str__(self) -> str:
        return f"{self._render('simple')}\n{self.summary()}"

    def summary(self) -> str:
        """What was found, in words."""
        chosen, before = self.chosen, fmean(self.original)
        asked = f"asked for at least {self.limit:.6g}, the original's is {before:.6g}"
        if chosen is not None:
            found = f"quality {_value(chosen.verdict)} at {chosen.reached:.3f}"
            words = [f"{found} of the {UNITS[self.of]} ({asked})"]
        elif self.trials:
            best = max(self.trials, key=lambda trial: trial.verdict.value)
            words = [
                f"no smaller model keeps the quality ({asked}): the closest has "
                f"{_value(best.verdict)} at {best.reached:.3f}",
                "the model is a copy of the original",
            ]
        else:
            words = [f"no smaller model can be made ({asked}); the report says why"]
        higher = [t for t in self.trials if -t.verdict.lost > max(t.verdict.margin, 0.0)]
        if higher:
            shares = ", ".join(f"{trial.reached:.3f}" for trial in higher)
            words.append(f"above the original's at {shares}: is higher better in this metric?")
        noise = max((trial.verdict.margin for trial in self.trials), default=0.0)
        if noise > self.allowed / 2:
            words.append(f"the metric scatters by ± {noise:.2g}: the mean of more would allow more")
        words.append(f"{self.evaluations} evaluations")
        return "; ".join(words)

    def to_dict(self) -> dict[str, Any]:
        """The search as plain data, without the model and its report."""
        trials = [
            {
                "share": trial.share,
                "reached": trial.reached,
                "values": list(trial.verdict.values),
                "margin": trial.verdict.margin,
                "kept": trial.verdict.kept,
                "seconds": trial.seconds,
            }
            for trial in self.trials
        ]
        return {
            "of": self.of, "limit": self.limit, "original": list(self.original), "trials": trials
        }  # fmt: skip

    def plot(self, ax: "Axes | None" = None) -> "Figure":
        """The quality of what was tried against its share, with the limit and what was chosen.

        >>> result.plot().savefig("quality.png")  # doctest: +SKIP

        It is drawn into the axes `ax` if any are given. An ImportError is raised without
        matplotlib, which the extra ``plot`` installs.
        """
        with needs_matplotlib("plot()"):
            from tdecomp.pictures.shares import quality_against_share
        points = {trial: _point(trial) for trial in self.trials}
        return quality_against_share(
            list(points.values()), None if self.chosen is None else points[self.chosen],
            original=fmean(self.original), limit=self.limit, unit=UNITS[self.of], ax=ax,
        )  # fmt: skip

    def _repr_html_(self) -> str:
        return f"{self._render('html')}<p>{self.summary()}</p>"

    def _render(self, style: str) -> str:
        unit = f"of the {UNITS[self.of]}"
        headers = ["asked for", unit, "quality", "lost", "margin", "kept", "evaluations", "seconds"]
        first = ["", "1.000", f"{fmean(self.original):.6g}", "", "", "", str(len(self.original))]
        body = [[*first, ""], *(_cells(trial, trial is self.chosen) for trial in self.trials)]
        return filled_columns(headers, body, right=[*headers[:5], *headers[6:]], style=style)


def _cells(trial: Trial, chosen: bool) -> list[str]:
    verdict = trial.verdict
    return [
        f"{trial.share:.3f}",
        f"{trial.reached:.3f}",
        f"{verdict.value:.6g}",
        f"{verdict.lost:.4g}",
        f"{verdict.margin:.2g}" if verdict.margin else "",
        "chosen" if chosen else "yes" if verdict.kept else "no",
        str(len(verdict.values)),
        f"{trial.seconds:.1f}",
    ]


def _point(trial: Trial) -> tuple[float, float, float, bool]:
    verdict = trial.verdict
    return trial.reached, verdict.value, verdict.margin, verdict.kept


def _value(verdict: Verdict) -> str:
    return f"{verdict.value:.6g}" + (f" ± {verdict.margin:.2g}" if verdict.margin else "")
