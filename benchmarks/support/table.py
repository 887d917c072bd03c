"""A comparison as tables: plain text, Markdown and LaTeX."""

from collections.abc import Sequence

from tabulate import tabulate

from benchmarks.support.rows import NO_RECOVERY, ORIGINAL, Row
from benchmarks.support.summary import (
    Line,
    best_of,
    curve_in_words,
    each_once,
    lines_of,
    stage_in_words,
    stages_of,
)

MISSING = "–"
FORMATS = {"text": "simple", "markdown": "github", "latex": "latex_raw"}
_BOLD = {"text": "*{}", "markdown": "**{}**", "latex": r"\textbf{{{}}}"}
# What is measured, its title, the format of its numbers; the quality's title is its measure.
_KEPT = {"quality": ("", ".2f"), "output_error": ("output error", ".3g")}
_COSTS = {
    "macs_share": ("MACs, of the original's", ".3f"),
    "params_share": ("parameters, of the original's", ".3f"),
    "time_share": ("measured time, of the original's", ".2f"),
}


def format_tables(rows: Sequence[Row], style: str) -> str:
    """What each method keeps at each share, stage by stage, then what it costs.

    The best of each share is bold, in plain text marked by a star.
    """
    lines = lines_of(rows)
    stages = stages_of(lines)
    parts = []
    for name, (title, form) in _KEPT.items():
        measure = title or next((row.found.measure for row in rows if row.found.measure), "")
        for stage in stages:
            heading = f"{measure}, {stage_in_words(stage)}"
            originals = [
                x for x in lines if x.run.method == ORIGINAL and x.run.finetune == stage[1]
            ]
            shown = [line for line in lines if line.run.stage == stage]
            table = _table(shown, name, form, style, originals if name == "quality" else ())
            parts.append(_titled(heading, table, style))
    for name, (title, form) in _COSTS.items():  # no step after the decomposition changes them
        parts.append(_titled(title, _table(each_once(lines, name), name, form, style), style))
    for recover in dict.fromkeys(recover for recover, _ in stages):
        mine = [line for line in lines if line.run.recover == recover]
        title = "seconds to decompose" + ("" if recover == NO_RECOVERY else f" and {recover}")
        parts.append(
            _titled(title, _table(each_once(mine, "seconds"), "seconds", ".2f", style), style)
        )
    return "\n\n".join(part for part in parts if part)


def failures(rows: Sequence[Row]) -> list[str]:
    """Why some runs are missing; the same reason once for each method."""
    found: dict[tuple[str, str], list[str]] = {}
    several = len({row.run.seed for row in rows}) > 1
    for row in rows:
        if row.found.reason is not None:
            shares = found.setdefault((row.run.method, row.found.reason), [])
            words = f"{row.run.share}" + (f" (seed {row.run.seed})" if several else "")
            shares += [] if words in shares else [words]
    return [
        f"{method} at {', '.join(shares)} left out: {reason}"
        for (method, reason), shares in found.items()
    ]


def _table(
    lines: Sequence[Line], name: str, form: str, style: str, originals: Sequence[Line] = ()
) -> list[list[str]]:
    """A line for each curve, a column for each share; nothing where nothing was measured."""
    lines = [line for line in lines if line.run.method != ORIGINAL]
    shares = sorted({line.run.share for line in lines}, reverse=True)
    at = {(line.curve, line.run.share): line for line in lines}
    best = best_of(lines, name) if name in {*_KEPT, "time_share"} else {}
    table = [
        [ORIGINAL, _cell(line, name, form), *[""] * (len(shares) - 1)]
        for line in originals
        if line.values(name)
    ]
    for curve in dict.fromkeys(line.curve for line in lines):
        cells = []
        for share in shares:
            known = at.get((curve, share))
            cell = MISSING if known is None else _cell(known, name, form)
            marked = known is not None and known in best.get(share, ())
            cells.append(_BOLD[style].format(cell) if marked else cell)
        if {*cells} != {MISSING}:
            table.append([curve_in_words(curve), *cells])
    return [["method", *map(str, shares)], *table] if table else []


def _cell(line: Line, name: str, form: str) -> str:
    if not line.values(name):
        return MISSING
    spread = line.spread(name)
    return format(line.mean(name), form) + ("" if spread is None else f" ± {spread:{form}}")


def _titled(title: str, table: list[list[str]], style: str) -> str:
    if not table:
        return ""
    if style == "latex":
        table = [[_latex(cell) for cell in line] for line in table]
    alignment = ["left", *["right"] * (len(table[0]) - 1)]
    text = tabulate(
        table[1:], table[0], tablefmt=FORMATS[style], colalign=alignment, disable_numparse=True
    )
    heading = {"text": f"{title}\n", "markdown": f"**{title}**\n", "latex": f"% {title}"}[style]
    return f"{heading}\n{text}"


def _latex(cell: str) -> str:
    for plain, escaped in (("_", r"\_"), ("%", r"\%"), ("±", r"$\pm$"), (MISSING, "--")):
        cell = cell.replace(plain, escaped)
    return cell
