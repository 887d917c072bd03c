"""The pages of the site and their blocks of Python."""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))

_BLOCK = re.compile(r"^(?P<indent> *)```python\b.*?\n(?P<code>.*?)^(?P=indent)```", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """One block of Python, and the line of its page that it begins on."""

    page: Path
    line: int
    code: str

    def run(self, names: dict[str, object]) -> None:
        """Run it with these names; a traceback shows the page and its line."""
        exec(compile("\n" * (self.line - 1) + self.code, self.page, "exec"), names)


def title(page: Path) -> str:
    """Where the page lies, for the names of tests."""
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of Python of a page, in order."""
    text = page.read_text()
    for found in _BLOCK.finditer(text):
        line = 1 + text.count("\n", 0, found.start("code"))
        yield Block(page, line, textwrap.dedent(found["code"]))


def is_slow(page: Path) -> bool:
    """Whether the front matter says that the page takes more than a few seconds."""
    return bool(re.match(r"---\n(.*\n)*?slow: true\n(.*\n)*?---\n", page.read_text()))


def needed(page: Path) -> str | None:
    """The package outside of the development set that the front matter says the page needs."""
    found = re.match(r"---\n(?:.*\n)*?needs: (\w+)\n(?:.*\n)*?---\n", page.read_text())
    return found[1] if found else None
