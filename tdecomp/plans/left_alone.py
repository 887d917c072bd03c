"""What is left alone and costs most, in words."""

from collections.abc import Sequence

from tdecomp.layers.cost import Cost

_SHOWN = 3


def largest_left_alone(found: Sequence[tuple[Cost, str, str]], whole: Cost, unit: str) -> str:
    """The most expensive of what is left alone in a unit, "macs" or "params", and the reasons.

    `found` are costs, names and reasons.
    """
    amounts = [(getattr(cost, unit) or 0, name, why) for cost, name, why in found]
    costly = [
        f"{name} ({amount / getattr(whole, unit):.1%}: {why})"
        for amount, name, why in sorted(amounts, key=lambda entry: -entry[0])[:_SHOWN]
        if amount > 0
    ]
    named = "MACs" if unit == "macs" else "parameters"
    return f"the largest of all {named}: {'; '.join(costly)}" if costly else ""
