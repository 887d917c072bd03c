"""Run the code on pages, and write what it prints and draws into them.

python -m docs.outputs docs/learn/*.md docs/methods/*.md

A block ```text right below a block of code gets what that code prints; one with a title is not
compared by the tests, such as a measured time. Pictures (*.svg) go to `figures/` beside the page.
"""

import os
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path

import matplotlib

from tests.docs.pages import blocks, give_torchvision


def rewrite(page: Path) -> None:
    """Write what the blocks print below them, and keep the pictures that they draw."""
    give_torchvision(page)
    text, pieces, end, home = page.read_text(), [], 0, Path.cwd()
    names: dict[str, object] = {"__name__": "__main__"}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for block in blocks(page):
                printed = textwrap.indent(block.run(names), block.indent)
                if block.shown is not None:
                    pieces += [text[end : block.span[0]], printed]
                    end = block.span[1]
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
