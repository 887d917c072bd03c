"""A comparison as tables: plain text, Markdown and LaTeX."""

from collections.abc import Callable, Sequence

from tabulate import tabulate

from benchmarks.support.rows import ORIGINAL, Row
from benchmarks.support.summary import (
    Line,
    best_of,
    curve_in_words,
    lines_of,
    stage_in_words,
    stages_of,
)

MISSING = "–"
FORMATS = {"text": "simple", "markdown": "github", "latex": "latex_raw"}
_BOLD = {"text": "*{}", "markdown": "**{}**", "latex": r"\textbf{{{}}}"}
# What is measured, its title, and the format of its numbers.
_MEASURED = {"quality": "", "output_error": "output error"}


def format_tables(rows: Sequence[Row], style: str) -> str:
    """What each method keeps at each share, stage by stage, then what it costs.

    The best of each share is bold, in plain text marked by a star.
    """
    lines = lines_of(rows)
    parts = []
    for name, title in _MEASURED.items():
        measure = title or next((row.found.measure for row in rows if row.found.measure), "")
        for stage in stages_of(lines):
            at = [line for line in lines if line.run.stage == stage]
            if any(line.values(name) for line in at):
                heading = f"{measure}, {stage_in_words(stage)}"
                parts.append(_titled(heading, _kept(at, lines, name, style), style))
    parts.append(_titled("costs, of the original's", _costs(lines), style))
    return "\n\n".join(parts)


def failures(rows: Sequence[Row]) -> list[str]:
    """Why some runs are missing; the same reason once for each method."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.found.reason is not None:
            shares = found.setdefault((row.run.method, row.found.reason), [])
            shares += [] if row.run.share in shares else [row.run.share]
    return [
        f"{method} at {', '.join(map(str, shares))} left out: {reason}"
        for (method, reason), shares in found.items()
    ]


def _kept(at: Sequence[Line], lines: Sequence[Line], name: str, style: str) -> list[list[str]]:
    """A line for each curve, a column for each share, and one for the original."""
    shares = sorted({line.run.share for line in lines if line.run.method != ORIGINAL}, reverse=True)
    best = best_of(at, name)
    precise = ".2f" if name == "quality" else ".3g"
    table = [["method", *map(str, shares)]]
    steps = at[0].run.finetune
    for line in lines:
        if line.run.method == ORIGINAL and line.run.finetune == steps and name == "quality":
            table.append([ORIGINAL, _cell(line, name, precise), *[""] * (len(shares) - 1)])
    for curve in dict.fromkeys(line.curve for line in at if line.run.method != ORIGINAL):
        cells = []
        for share in shares:
            cell = MISSING
            for line in at:
                if line.curve == curve and line.run.share == share:
                    cell = _cell(line, name, precise)
                    cell = _BOLD[style].format(cell) if best.get(share) is line else cell
            cells.append(cell)
        table.append([curve_in_words(curve), *cells])
    return table


def _costs(lines: Sequence[Line]) -> list[list[str]]:
    """A line for each curve and share; what comes after the decomposition changes no cost."""
    columns: dict[str, Callable[[Line], str]] = {
        "share asked": lambda line: f"{line.run.share:g} of {line.run.equal}",
        "layers changed": lambda line: _number(line, "layers", ".0f"),
        "params": lambda line: _number(line, "params_share", ".3f"),
        "MACs": lambda line: _number(line, "macs_share", ".3f"),
        "time": lambda line: _number(line, "time_share", ".2f"),
        "fit (s)": lambda line: _number(line, "seconds", ".2f"),
    }
    table = [["method", *columns]]
    first = stages_of(lines)[:1]
    for line in lines:
        if line.run.stage in first and line.run.method != ORIGINAL and line.values("macs"):
            cells = [column(line) for column in columns.values()]
            table.append([curve_in_words(line.curve), *cells])
    return table


def _number(line: Line, name: str, form: str) -> str:
    return format(line.mean(name), form) if line.values(name) else MISSING


def _cell(line: Line, name: str, form: str) -> str:
    spread = line.spread(name)
    return _number(line, name, form) + ("" if spread is None else f" ± {format(spread, form)}")


def _titled(title: str, table: list[list[str]], style: str) -> str:
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
