"""A layer and the chain in its place as a small SVG: boxes and arrows, no dependency."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from tdecomp.files.whole_file import whole_file
from tdecomp.pictures.style import DARK, LIGHT

# Of the text: the height of a line, and the width of a character on average.
_LINE, _CHAR, _BOLD = 17, 7.4, 8.2
_PAD, _ARROW, _MARGIN = 10, 76, 14
_STRIP = 12  # the height of the strips that compare the costs
_STRIP_LABEL = 190


@dataclass(frozen=True)
class Box:
    """A stage: its kernel, then the lines below, and its cost in the unit of the drawing."""

    lines: tuple[str, ...]
    amount: int

    @property
    def width(self) -> float:
        return max(len(line) for line in self.lines) * _CHAR + 2 * _PAD


@dataclass(frozen=True)
class Strip:
    """A row of boxes, with the channels on each arrow and the rank where they are one."""

    caption: str
    boxes: tuple[Box, ...]
    channels: tuple[int, ...]  # one more than boxes
    ranks: tuple[str | None, ...]  # of the same arrows
    total: str  # the cost, in words

    @property
    def width(self) -> float:
        return sum(box.width for box in self.boxes) + len(self.channels) * self.arrow

    @property
    def arrow(self) -> float:
        return max(_ARROW, *(_mark_width(rank) + 14 for rank in self.ranks if rank), 0)

    @property
    def height(self) -> int:
        return max(len(box.lines) for box in self.boxes) * _LINE + 2 * _PAD


@dataclass(frozen=True)
class Drawing:
    """A picture as the text of an SVG, which notebooks show.

    >>> drawing = tdecomp.draw(nn.Conv2d(64, 64, 3), "lowrank", 16)
    >>> drawing.save("lowrank.svg")        # doctest: +SKIP
    >>> str(drawing)[:4]
    '<svg'

    Attributes
    ----------
    title : str
        What it shows, for those who cannot see it.
    svg : str
        The text of the SVG.
    """

    title: str
    svg: str

    def __str__(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return f"<Drawing: {self.title}>"

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the SVG; a ValueError for a file name that says it is something else."""
        if Path(file).suffix != ".svg":
            raise ValueError(f"a drawing is SVG: expected a file name in .svg, got {file!r}")
        with whole_file(file) as draft:
            draft.write_text(self.svg, encoding="utf-8")


def drawn(title: str, strips: Sequence[Strip], description: str) -> Drawing:
    """The strips below one another, each with a bar as long as its cost."""
    largest = max(sum(box.amount for box in strip.boxes) for strip in strips) or 1
    captions = max(len(strip.caption) for strip in strips) * _CHAR
    width = max(captions, *(strip.width for strip in strips)) + 2 * _MARGIN
    parts, y = [], float(_MARGIN)
    for strip in strips:
        parts.append(_text(_MARGIN, y + 12, strip.caption, "start", bold=True))
        y += _LINE + 8
        parts += _boxes(strip, (width - strip.width) / 2, y)
        y += strip.height + 10
        parts += _bar(strip, y, (width - 2 * _MARGIN - _STRIP_LABEL) / largest)
        y += _STRIP + 26
    mark = hashlib.sha256("".join(parts).encode()).hexdigest()[:8]  # a page may hold several
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {y - 12:.0f}" '
        f'width="{width:.0f}" height="{y - 12:.0f}" role="img" '
        f'aria-labelledby="title-{mark} desc-{mark}" style="max-width:100%;height:auto" '
        'font-family="system-ui,Helvetica,Arial,sans-serif" font-size="13">'
        f'<title id="title-{mark}">{escape(title)}</title>'
        f'<desc id="desc-{mark}">{escape(description)}</desc>'
        '<rect width="100%" height="100%" fill="#ffffff"/>'
    )
    return Drawing(title, "\n".join([head, *parts, "</svg>"]))


def _boxes(strip: Strip, x: float, y: float) -> list[str]:
    parts, middle = [], y + strip.height / 2
    for i, (count, rank) in enumerate(zip(strip.channels, strip.ranks, strict=True)):
        parts += _arrow(x, middle, strip.arrow, count, rank)
        x += strip.arrow
        if i < len(strip.boxes):
            box = strip.boxes[i]
            size = f'width="{box.width:.1f}" height="{strip.height}" rx="4"'
            fill = LIGHT if len(strip.boxes) == 1 else "#ffffff"
            parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="{fill}" stroke="{DARK}"/>')
            top = middle - len(box.lines) * _LINE / 2 + 13
            parts += [
                _text(x + box.width / 2, top + row * _LINE, line, bold=row == 0)
                for row, line in enumerate(box.lines)
            ]
            x += box.width
    return parts


def _mark_width(rank: str) -> float:
    return len(rank) * _BOLD + 12


def _arrow(x: float, y: float, length: float, channels: int, rank: str | None) -> list[str]:
    """From left to right, the channels above and the rank below, light on dark."""
    end, centre = x + length - 2, x + length / 2
    parts = [
        f'<path d="M{x + 2:.1f} {y:.1f}H{end - 6:.1f}" stroke="{DARK}" stroke-width="1.5"/>',
        f'<path d="M{end:.1f} {y:.1f}l-8 -4v8z" fill="{DARK}"/>',
        _text(centre, y - 7, str(channels)),
    ]
    if rank is not None:
        wide = _mark_width(rank)
        box = f'x="{centre - wide / 2:.1f}" y="{y + 7:.1f}" width="{wide:.1f}" height="18" rx="9"'
        parts.append(f'<rect {box} fill="{DARK}"/>')
        parts.append(_text(centre, y + 20, rank, bold=True, fill="#ffffff"))
    return parts


def _bar(strip: Strip, y: float, scale: float) -> list[str]:
    """The cost of each box, one after the other, and their sum in words."""
    parts, x = [], float(_MARGIN)
    for box in strip.boxes:
        size = f'width="{box.amount * scale:.2f}" height="{_STRIP}"'
        where = f'x="{x:.2f}" y="{y:.1f}" {size}'
        parts.append(f'<rect {where} fill="{LIGHT}" stroke="{DARK}" stroke-width="0.8"/>')
        x += box.amount * scale
    return [*parts, _text(x + 8, y + 11, strip.total, "start")]


def _text(
    x: float, y: float, words: str, anchor: str = "middle", *, bold: bool = False, fill: str = DARK
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}"'
    return f"<text {where}{weight}>{escape(words)}</text>"
