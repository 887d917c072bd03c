"""Run the code on pages, and write what it prints and draws into them.

python docs/outputs.py docs/learn/*.md docs/methods/*.md

A block ```text below a block of code holds what that code prints; with a title it holds measured
times, which differ from run to run. Pictures (*.svg) go to the folder `figures` beside the page.
"""

import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import matplotlib

_BLOCKS = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?P<output>\n```text(?P<title>[^\n]*)\n(?P<shown>.*?)^```\n)?",
    re.S | re.M,
)


def runs(page: Path) -> Iterator[tuple[re.Match[str], str]]:
    """Each block of a page, run in order in one namespace, and what it prints."""
    text, names = page.read_text(), {"__name__": "page"}
    for block in _BLOCKS.finditer(text):
        # Empty lines in front, so that a traceback has the line of the page.
        before = "\n" * text.count("\n", 0, block.start("code"))
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(before + block["code"], page.name, "exec"), names)
        lines = printed.getvalue().splitlines()
        yield block, "".join(f"{line.rstrip()}\n" for line in lines)


def rewrite(page: Path) -> None:
    """Write what the blocks print below them, and keep the pictures that they draw."""
    pieces, end, text, home = [], 0, page.read_text(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for block, printed in runs(page):
                if block["output"] is not None:
                    pieces += [text[end : block.start("shown")], printed]
                    end = block.end("shown")
            for picture in Path(folder).glob("*.svg"):
                (page.parent / "figures").mkdir(exist_ok=True)
                shutil.copy(picture, page.parent / "figures" / picture.name)
        finally:
            os.chdir(home)
    page.write_text("".join([*pieces, text[end:]]))


def main(pages: list[str]) -> None:
    """Rewrite these pages."""
    # The same picture from the same code, and its text as text, which keeps the file small.
    matplotlib.rcParams.update({"svg.hashsalt": "tdecomp", "svg.fonttype": "none"})
    os.environ["SOURCE_DATE_EPOCH"] = "0"
    for page in pages:
        rewrite(Path(page).resolve())


if __name__ == "__main__":
    main(sys.argv[1:])
