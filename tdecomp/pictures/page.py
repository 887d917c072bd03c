"""A page of one file: text, pictures and a table that a few lines of script let readers sort."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tdecomp._distribution import VERSION
from tdecomp.pictures.drawing import Drawing

_STYLE = """
body { font: 16px/1.5 system-ui, Helvetica, Arial, sans-serif; color: #1a1a1a;
  background: #ffffff; max-width: 76rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.warnings { border-left: 6px solid #1a1a1a; padding: .5rem 1rem; background: #f2f2f2; }
.wide { overflow-x: auto; } .wide img, .wide svg { max-width: none !important; }
li, p, summary { overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: .875rem; }
th, td { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid #dddddd;
  vertical-align: top; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.words { white-space: normal; min-width: 30rem; }
th[scope=row] { position: sticky; left: 0; background: #ffffff; font-weight: 600; }
thead th:first-child { position: sticky; left: 0; background: #ffffff; }
tfoot { font-weight: 600; }
th button { font: inherit; border: 0; background: none; padding: 0; cursor: pointer;
  text-decoration: underline; }
th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
summary { cursor: pointer; }
"""
_SCRIPT = """
const heads = document.querySelectorAll("#layers thead th");
const body = document.querySelector("#layers tbody");
heads.forEach((head, i) => {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.onclick = () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const key = row => row.cells[i].dataset.key ?? row.cells[i].textContent;
    const order = (a, b) => a - b || a.localeCompare(b, undefined, {numeric: true});
    [...body.rows].sort((a, b) => sign * order(key(a), key(b))).forEach(row => body.append(row));
  };
});
"""


@dataclass(frozen=True)
class Column:
    """A column: the cells of the rows and of the sums below, and numbers to sort the rows by."""

    title: str
    cells: Sequence[str]
    keys: Sequence[float | None] | None = None  # None for a column of words
    sums: Sequence[str] = ("", "")

    def cell(self, i: int) -> str:
        if self.keys is None:
            long = " class=words" if len(self.cells[i]) > 40 else ""
            return f"<td{long}>{escape(self.cells[i])}</td>"
        key = self.keys[i]
        known = "" if key is None else repr(float(key))
        return f'<td class=number data-key="{known}">{escape(self.cells[i])}</td>'


@dataclass(frozen=True)
class Page:
    """What a page shows, in this order."""

    title: str
    warnings: Sequence[str]
    facts: Sequence[str]
    picture: tuple[str, str]  # an SVG with its description, or "" with what is missing for one
    columns: Sequence[Column]  # the first names the rows
    drawings: Sequence[Drawing]

    def html(self) -> str:
        """The page as text; it fetches nothing, and the script is only for sorting."""
        parts = [
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(self.title)}</title><style>{_STYLE}</style></head><body><main>",
            f"<h1>{escape(self.title)}</h1>",
        ]
        if self.warnings:
            parts += ['<div class="warnings">', *map(_paragraph, self.warnings), "</div>"]
        parts += ["<ul>", *(f"<li>{escape(fact)}</li>" for fact in self.facts), "</ul>"]
        parts += ["<h2>Costs and errors</h2>", self._picture(), "<h2>Layers</h2>", self._table()]
        if self.drawings:
            parts.append("<h2>Chains</h2>")
        for drawing in self.drawings:
            about = f"<summary>{escape(drawing.title)}</summary>"
            parts.append(f'<details>{about}<div class="wide">{drawing}</div></details>')
        parts += [
            _paragraph(f"Made by tdecomp {VERSION}."),
            f"</main><script>{_SCRIPT}</script></body></html>",
        ]
        return "\n".join(parts)

    def _picture(self) -> str:
        svg, words = self.picture
        if not svg:
            return _paragraph(words)
        data = b64encode(svg.encode()).decode()
        source = f"data:image/svg+xml;base64,{data}"
        return f'<div class="wide"><img src="{source}" alt="{escape(words)}"></div>'

    def _table(self) -> str:
        heads = "".join(
            f"<th scope=col{_numeric(column)}>{escape(column.title)}</th>"
            for column in self.columns
        )
        names, *others = self.columns
        rows = [
            f"<tr><th scope=row>{escape(name)}</th>{''.join(c.cell(i) for c in others)}</tr>"
            for i, name in enumerate(names.cells)
        ]
        sums = [
            f"<tr><th scope=row>{escape(name)}</th>"
            + "".join(f"<td{_numeric(c)}>{escape(c.sums[i])}</td>" for c in others)
            + "</tr>"
            for i, name in enumerate(names.sums)
        ]  # fmt: skip
        label = '<div class="wide" tabindex="0" role="region" aria-label="Table of the layers">'
        return "\n".join([
            f'{label}<table id="layers"><thead><tr>{heads}</tr></thead><tbody>', *rows,
            "</tbody><tfoot>", *sums, "</tfoot></table></div>",
        ])  # fmt: skip


def _numeric(column: Column) -> str:
    return "" if column.keys is None else " class=number"


def _paragraph(words: str) -> str:
    return f"<p>{escape(words)}</p>"
