"""The pages of the site, their blocks of Python, and what these print."""

import contextlib
import io
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.support.torchvision_import import import_torchvision

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))

# A block, and the block of text right below it, which shows what the code prints.
_BLOCK = re.compile(
    r"^(?P<indent> *)```python\b.*?\n(?P<code>.*?)^(?P=indent)```\n"
    r"(?:\n(?P=indent)```text(?P<title>.*?)\n(?P<shown>.*?)^(?P=indent)```)?",
    re.M | re.S,
)
# What needs torchvision: transformers, timm and peft import it.
_TORCHVISION = re.compile(r"\b(import|from) (torchvision|transformers|timm|peft)\b")


@dataclass(frozen=True)
class Block:
    """One block of Python, and the line of its page that it begins on."""

    page: Path
    line: int
    code: str
    indent: str
    shown: str | None  # what it prints, as the page says
    titled: bool  # with a title that is what it printed once, such as a measured time
    span: tuple[int, int]  # of what is shown, in the page

    def run(self, names: dict[str, object]) -> str:
        """What it prints with these names; a traceback shows the page and its line."""
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("\n" * (self.line - 1) + self.code, self.page, "exec"), names)
        lines = printed.getvalue().splitlines()
        return "".join(f"{line.rstrip()}\n" for line in lines)


def title(page: Path) -> str:
    """Where the page lies, for the names of tests."""
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of Python of a page, in order."""
    text = page.read_text()
    for found in _BLOCK.finditer(text):
        line = 1 + text.count("\n", 0, found.start("code"))
        code, shown = textwrap.dedent(found["code"]), found["shown"]
        shown = None if shown is None else textwrap.dedent(shown)
        titled, span = bool(found["title"]), found.span("shown")
        yield Block(page, line, code, found["indent"], shown, titled, span)


def give_torchvision(page: Path) -> None:
    """Import torchvision as it can be imported here, for a page that needs it."""
    if _TORCHVISION.search(page.read_text()):
        import_torchvision()


def is_slow(page: Path) -> bool:
    """Whether the front matter says that the page takes more than a few seconds."""
    return bool(re.match(r"---\n(.*\n)*?slow: true\n(.*\n)*?---\n", page.read_text()))


def needed(page: Path) -> str | None:
    """The package outside of the development set that the front matter says the page needs."""
    found = re.match(r"---\n(?:.*\n)*?needs: (\w+)\n(?:.*\n)*?---\n", page.read_text())
    return found[1] if found else None
