"""Chains that would not pay are not made."""

from dataclasses import replace

from tdecomp.ranks.base import Choice
from tdecomp.ranks.breakeven import by_parameters
from tdecomp.ranks.grid import largest_rank

# Parameters of a layer whose singular values are computed for a mere remark.
_MOST = 4_000_000


def guarded(choice: Choice, *, expect: bool = True) -> Choice:
    """The choice, unless its chain would cost as much as the layer or more.

    With `expect` the reason says what the largest chain that saves would lose, where it is known
    without a fit.
    """
    if choice.candidate is None or choice.rank is None:
        return choice
    before, after = choice.candidate.before, choice.candidate.cost(choice.rank)
    if after.amount >= before.amount:
        words = (
            f"{choice.candidate.method} at rank {choice.rank} would not save "
            f"{before.unit}: {after.amount:,} against the layer's {before.amount:,}"
        )
        best = largest_rank(choice.candidate, lambda cost: cost.amount < before.amount)
        if expect and best is not None and before.params <= _MOST:
            error = choice.candidate.expected(best)
            # Of several ranks it is a bound, unless a fit told it.
            known = choice.candidate.by_outputs or choice.candidate.best_ranks() is not None
            bound = isinstance(best, tuple) and not known
            if error is not None:
                words += f"; {choice.candidate.would_lose(best, error, bound=bound)}"
        return Choice(reason=words)
    notes = (choice.note, by_parameters(choice.candidate))
    return replace(choice, note="; ".join(dict.fromkeys(n for n in notes if n)) or None)
