"""Tables of text without their empty columns."""

from collections.abc import Collection, Sequence

from tabulate import tabulate


def filled_columns(
    headers: Sequence[str], body: Sequence[Sequence[str]], *, right: Collection[str], style: str
) -> str:
    """The columns that hold anything, in a style of tabulate; those in `right` aligned there."""
    shown = [i for i in range(len(headers)) if any(line[i] for line in body)]
    return tabulate(
        [[line[i] for i in shown] for line in body],
        [headers[i] for i in shown],
        tablefmt=style,
        disable_numparse=True,
        colalign=["right" if headers[i] in right else "left" for i in shown],
    )
