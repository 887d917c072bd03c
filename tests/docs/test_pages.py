"""Every block of every page runs as it stands, and every picture has a text."""

import ast
import re
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.support.torchvision_import import import_torchvision
from tdecomp.layers.spec import KINDS
from tests.docs.pages import PAGES, ROOT, blocks, is_slow, needed, title

WITH_BLOCKS = [
    pytest.param(page, id=title(page), marks=pytest.mark.slow if is_slow(page) else ())
    for page in PAGES
    if any(blocks(page))
]
_PICTURE = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<file>[^)\s]+)[^)]*\)")
_TAG = re.compile(r"<img\b[^>]*>")


@pytest.fixture
def reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_methods: None
) -> Iterator[None]:  # fmt: skip
    """Where a page is tried: an empty folder, no network, nothing left behind."""
    del own_methods
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", _no_network)
    kinds = dict(KINDS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    KINDS.clear()
    KINDS.update(kinds)


def _no_network(host: object, *_: object, **__: object) -> None:
    raise OSError(f"a page must not need the network, and looked up {host!r}")


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("page", WITH_BLOCKS)
def test_the_blocks_of_a_page_run_in_order(page: Path) -> None:
    package = needed(page)
    if package is not None:
        pytest.importorskip(package)
        warnings.simplefilter("ignore")  # those of a package that nobody has pinned
    if "import torchvision" in page.read_text() or "from torchvision" in page.read_text():
        import_torchvision()
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        block.run(names)


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_blocks_need_no_file_of_the_repository(page: Path) -> None:
    for block in blocks(page):
        for node in ast.walk(ast.parse(block.code)):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert not [m for m in modules if m and m.split(".")[0] in ("benchmarks", "tests")]


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=title)
def test_pictures_exist_and_have_a_text(page: Path) -> None:
    text = page.read_text()
    for picture in _PICTURE.finditer(text):
        assert picture["alt"].strip(), picture[0]
        assert (page.parent / picture["file"]).is_file(), picture[0]
    for tag in _TAG.findall(text):
        assert re.search(r'\balt="[^"]+"', tag), tag
