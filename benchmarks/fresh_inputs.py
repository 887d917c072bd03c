"""Whether reported errors hold on new inputs, and whether recovery helps there.

Small networks are drawn at random, decomposed with 16 to 4,096 samples and recovered; each reported
error is compared with the error on 5,000 new inputs.

    python -m benchmarks.fresh_inputs --draws 200
"""

import argparse
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from tabulate import tabulate
from torch import Tensor, nn

import tdecomp
from benchmarks.support.drawn_networks import KINDS, Drawn, drawn
from tdecomp.recovery.recovery import Recovery

ROWS = (16, 32, 64, 128, 256, 1024, 4096)
FRESH = 5000
ENOUGH = 256  # samples, from which on errors themselves are judged, not only their intervals
WORSE = 0.02  # by more than this share of the error a model must not become worse


@dataclass(frozen=True)
class Outcome:
    """What was reported of one recovery, and what is true of new inputs."""

    kind: str
    rows: int
    recovery: Recovery
    before: float  # the error on new inputs
    after: float

    @property
    def ratio(self) -> float:
        """Of the reported error to that on new inputs."""
        return self.recovery.error_after / self.after

    @property
    def holds(self) -> bool:
        """Whether the printed interval holds the error on new inputs."""
        margin = self.recovery.error_margin
        return margin is not None and abs(self.recovery.error_after - self.after) <= margin

    @property
    def worse(self) -> bool:
        return self.after > (1 + WORSE) * self.before


def outcome(
    given: Drawn, rows: int, seed: int, step: str = "refit", held_out: float = 0.2
) -> Outcome:
    """Decompose a network with so many samples, recover it, and try both on new inputs."""
    draw = torch.Generator().manual_seed(seed)
    x, fresh = given.inputs(rows), given.inputs(FRESH)
    share = 0.25 + 0.5 * float(torch.rand(1, generator=draw))
    size = max(rows // int(torch.randint(1, 9, (1,), generator=draw)), 4)
    data = tdecomp.Data(list(x.split(size)), held_out=held_out, augment=None)
    result = tdecomp.decompose(
        given.network, "dense", rank=tdecomp.Budget(macs=share), example_inputs=x[:1], data=data,
        progress=False,
    )  # fmt: skip
    recover = tdecomp.refit if step == "refit" else tdecomp.distill
    recovery = recover(result.model, given.network, data, progress=False)
    before, after = (lost(model, given.network, fresh) for model in (result.model, recovery.model))
    return Outcome(given.kind, rows, recovery, before, after)


def lost(model: nn.Module, original: nn.Module, x: Tensor) -> float:
    """The share of the variance of the original's outputs that is lost."""
    with torch.no_grad():
        wanted = torch.cat([original(part) for part in x.split(500)])
        found = torch.cat([model(part) for part in x.split(500)])
    return float((found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def outcomes(draws: int, step: str, rows: Sequence[int] = ROWS) -> Iterable[Outcome]:
    """So many, of each kind of network and each number of samples in turn."""
    combinations = list(product(rows, KINDS))
    for seed in range(draws):
        count, kind = combinations[seed % len(combinations)]
        yield outcome(drawn(kind, seed), count, seed, step)


def gain_kept(draws: int, step: str) -> float:
    """With 4,096 samples, the gain of recovery, as a share of that with nothing held out."""
    gains = []
    for seed, kind in product(range(draws), KINDS):
        pair = [outcome(drawn(kind, seed), ROWS[-1], seed, step, share) for share in (0.2, 0.0)]
        gains.append([(one.before - one.after) / one.before for one in pair])
    return sum(mine for mine, _ in gains) / sum(all_ for _, all_ in gains)


def summary(found: Sequence[Outcome]) -> list[list[str]]:
    """A line for each number of samples, and one for all of them."""
    lines = []
    for rows in (*sorted({one.rows for one in found}), None):
        some = [one for one in found if rows in (one.rows, None)]
        ratios = [one.ratio for one in some if one.after > 0]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [math.nan] * 3
        lines.append([
            "all" if rows is None else f"{rows:,}", str(len(some)),
            f"{quartiles[1]:.3f} ({quartiles[0]:.3f} to {quartiles[2]:.3f})",
            f"{sum(one.holds for one in some) / len(some):.1%}",
            f"{sum(one.worse for one in some) / len(some):.1%}",
            f"{statistics.mean((one.before - one.after) / one.before for one in some):.1%}",
        ])  # fmt: skip
    return lines


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=210)
    parser.add_argument("--step", choices=("refit", "distill"), default="refit")
    parser.add_argument("--gains", type=int, default=4, help="networks of each kind at 4,096")
    options = parser.parse_args()
    headers = [
        "samples", "draws", "reported / fresh error", "interval holds it",
        f"worse by over {WORSE:.0%}", "gain",
    ]  # fmt: skip
    found = list(outcomes(options.draws, options.step))
    print(tabulate(summary(found), headers=headers, disable_numparse=True))
    few = [one for one in found if one.rows < ENOUGH]
    enough = statistics.median(one.ratio for one in found if one.rows >= ENOUGH)
    print(f"median from {ENOUGH} samples on: {enough:.3f} (within 15% of 1)")
    print(f"intervals of fewer: {sum(one.holds for one in few) / len(few):.1%} hold (90%)")
    print(f"gain kept with {ROWS[-1]:,}: {gain_kept(options.gains, options.step):.1%} (90%)")


if __name__ == "__main__":
    main()
