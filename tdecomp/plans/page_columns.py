"""Rows as the columns of a page, with what each is sorted by."""

from collections.abc import Callable, Sequence

from tdecomp.layers.cost import Cost, count_in_words
from tdecomp.pictures.page import Column
from tdecomp.plans.row import Row

Pair = tuple[Cost, Cost]  # before and after


def page_columns(rows: Sequence[Row], rest: Pair, whole: Pair) -> list[Column]:
    """The columns that hold anything, with the sums of everything else and of the whole model."""
    columns = [
        Column("layer", [r.name or "(model)" for r in rows], sums=("everything else", "total")),
        Column("method", [row.method or "—" for row in rows]),
        Column("rank", ["" if row.rank is None else str(row.rank) for row in rows]),
        *_costs(rows, (rest, whole), "macs", "MACs", count_in_words),
        *_costs(rows, (rest, whole), "latency", "ms", lambda seconds: f"{1e3 * seconds:.3g}"),
    ]
    for name in ("expected_error", "weight_error", "output_error"):
        values = [getattr(row, name) for row in rows]
        columns.append(_numbers(name.replace("_", " "), values, "{:.4f}".format))
    margins = [row.output_error_margin for row in rows]
    columns.append(_numbers("± (95%)", margins, "{:.4f}".format))
    columns += [
        *_costs(rows, (rest, whole), "params", "parameters", count_in_words),
        Column("kind", [str(row.layer or "") for row in rows]),
        Column("notes", [row.remarks for row in rows]),
    ]
    return [column for column in columns if any(column.cells)]


def _costs(
    rows: Sequence[Row],
    sums: Sequence[Pair],
    name: str,
    title: str,
    words: Callable[[float], str],
) -> list[Column]:
    """One cost before and after, and the share that is left."""
    pairs = [(getattr(row.before, name), getattr(row.after, name)) for row in rows]
    below = [(getattr(before, name), getattr(after, name)) for before, after in sums]
    both = enumerate(("before", "after"))
    columns = [
        _numbers(f"{title} {when}", [pair[i] for pair in pairs], words, [p[i] for p in below])
        for i, when in both
    ]
    shares = [_share(*pair) for pair in pairs]
    share = _numbers(f"share of {title}", shares, "{:.3f}".format, [_share(*p) for p in below])
    return [*columns, share]


def _share(before: float | None, after: float | None) -> float | None:
    return after / before if before and after is not None else None


def _numbers(
    title: str,
    values: Sequence[float | None],
    words: Callable[[float], str],
    sums: Sequence[float | None] = (None, None),
) -> Column:
    cells, below = (["" if v is None else words(v) for v in given] for given in (values, sums))
    return Column(title, cells, values, below)
