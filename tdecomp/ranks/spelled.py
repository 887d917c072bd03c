"""Ranks written as one word, for command lines: numbers, names, and calls such as energy:0.9."""

import re
from typing import Any

from tdecomp.ranks.base import RankSelector
from tdecomp.ranks.breakeven import BreakEven
from tdecomp.ranks.budget import Budget
from tdecomp.ranks.energy import Energy
from tdecomp.ranks.fixed import Fixed
from tdecomp.ranks.ratio import Ratio
from tdecomp.ranks.vbmf import VBMF

# Each selector with the arguments that can be spelled, and how many of them must be. What needs
# data or example inputs is missing, since neither has a place on a command line.
_SELECTORS: dict[str, tuple[type[RankSelector], tuple[str, ...], int]] = {
    "breakeven": (BreakEven, (), 0),
    "vbmf": (VBMF, ("weaken",), 0),
    "energy": (Energy, ("share",), 1),
    "ratio": (Ratio, ("ratio", "of"), 2),
    "budget": (Budget, ("params", "round_to"), 1),
}
# How each form is written, and what it means.
FORMS = {
    "64": "this rank in every layer; 16,8 for a method with two, as tucker2",
    "0.25": "this share of each layer's largest useful rank",
    "breakeven": "the largest rank at which the chain is smaller than the layer",
    "vbmf": "the rank that variational Bayes finds; vbmf:weaken=0.5 takes a larger one",
    "energy:0.9": "the smallest rank that keeps this share of the squared singular values",
    "ratio:0.5,of=params": "at most this share of each layer's parameters",
    "budget:params=0.6": "at most this share of all parameters, taken where it loses least",
}
_INT, _FLOAT = re.compile(r"[0-9]{1,18}"), re.compile(r"[0-9]+\.[0-9]*|\.[0-9]+")


def spelled_rank(text: str) -> RankSelector:
    """The selector that a text spells; a ValueError lists the forms.

    >>> from tdecomp.ranks.spelled import spelled_rank
    >>> spelled_rank("ratio:0.5,of=params"), spelled_rank("0.25")
    (Ratio(ratio=0.5, of='params'), Ratio(ratio=0.25, of='rank'))

    After the colon stand the arguments of the selector as in Python, those without a name first.
    """
    name, colon, arguments = text.partition(":")
    try:
        if name in _SELECTORS:
            return _called(name, arguments.split(",") if colon else [])
        if colon:
            raise ValueError(f"there is no selector {name!r}")
        return _number(text)
    except ValueError as error:
        forms = ", ".join(FORMS)
        raise ValueError(f"rank {text!r}: {error}; expected one of these forms: {forms}") from error


def _number(text: str) -> RankSelector:
    values = [_value(part) for part in text.split(",")]
    whole = tuple(value for value in values if isinstance(value, int))
    if len(whole) == len(values):
        return Fixed(whole if len(whole) > 1 else whole[0])
    if len(values) == 1 and isinstance(values[0], float):
        if 0 < values[0] < 1:
            return Ratio(values[0], of="rank")
        raise ValueError("a share is above 0 and below 1, and a rank has no point")
    raise ValueError("this is neither a number nor the name of a selector")


def _called(name: str, arguments: list[str]) -> RankSelector:
    kind, options, needed = _SELECTORS[name]
    takes = f"{name} takes {' and '.join(options) or 'nothing'}"
    given: dict[str, Any] = {}
    for i, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if not equals and list(options[:i]) == list(given) and options[i:]:
            option, value = options[i], argument
        if option not in options or option in given:
            raise ValueError(f"{argument!r} cannot stand there, {takes}")
        given[option] = _value(value)
    if len(given) < needed:
        raise ValueError(takes)
    return kind(**given)


def _value(text: str) -> int | float | str:
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
