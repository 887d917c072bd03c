"""What is left alone and costs most, in words."""

from collections.abc import Sequence

from tdecomp.layers.cost import Cost

_SHOWN = 3


def largest_left_alone(found: Sequence[tuple[Cost, str, str]], whole: Cost, unit: str) -> str:
    """The most expensive of what is left alone in a unit, "macs" or "params", and the reasons.

    `found` are costs, names and reasons.
    """
    all_of_it = getattr(whole, unit) or 1
    shares = [((getattr(cost, unit) or 0) / all_of_it, name, why) for cost, name, why in found]
    costly = [
        f"{name} ({f'{share:.1%}' if share >= 0.001 else 'under 0.1%'}{why and f': {why}'})"
        for share, name, why in sorted(shares, key=lambda entry: -entry[0])[:_SHOWN]
        if share > 0
    ]
    named = "MACs" if unit == "macs" else "parameters"
    return f"the largest of all {named}: {'; '.join(costly)}" if costly else ""
