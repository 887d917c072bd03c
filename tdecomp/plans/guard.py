"""Chains that would not pay are not made."""

from dataclasses import replace

from tdecomp.ranks.base import Choice
from tdecomp.ranks.breakeven import by_parameters


def guarded(choice: Choice) -> Choice:
    """The choice, unless its chain would cost as much as the layer or more."""
    if choice.candidate is None or choice.rank is None:
        return choice
    before, after = choice.candidate.before, choice.candidate.cost(choice.rank)
    if after.amount >= before.amount:
        return Choice(
            reason=f"{choice.candidate.method} at rank {choice.rank} would not save "
            f"{before.unit}: {after.amount:,} against the layer's {before.amount:,}"
        )
    notes = (choice.note, by_parameters(choice.candidate))
    return replace(choice, note="; ".join(dict.fromkeys(n for n in notes if n)) or None)
