"""Every block of every page runs as it stands, and every picture has a text."""

import ast
import re
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tdecomp
from tdecomp.layers.spec import KINDS
from tests.docs.pages import PAGES, ROOT, blocks, give_torchvision, is_slow, needed, title

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


_look_up = socket.getaddrinfo
_THIS_MACHINE = (None, "localhost", "127.0.0.1", "0.0.0.0", "::1", "::")


def _no_network(host: Any, *args: Any, **options: Any) -> Any:
    if host in _THIS_MACHINE:  # where a local cluster is
        return _look_up(host, *args, **options)
    raise OSError(f"a page must not need the network, and looked up {host!r}")


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("page", WITH_BLOCKS)
def test_the_blocks_of_a_page_run_in_order(page: Path) -> None:
    package = needed(page)
    if package is not None:
        pytest.importorskip(package)
        warnings.simplefilter("ignore")  # those of a package that nobody has pinned
    give_torchvision(page)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        printed = block.run(names)
        if block.shown is not None and not block.titled:
            check_alike(printed, block.shown)
    page_pictures = set(re.findall(r"\(figures/(.*?\.svg)\)", page.read_text()))
    assert page_pictures >= {picture.name for picture in Path().glob("*.svg")}


def check_alike(printed: str, shown: str) -> None:
    """Up to what training differs by between machines: a budget may then choose another rank."""
    for got, expected in zip(printed.splitlines(), shown.splitlines(), strict=True):
        assert _words(got) == _words(expected)
        if not any(method in got.split() for method in tdecomp.registered()):
            assert _decimals(got) == pytest.approx(_decimals(expected), rel=0.1, abs=0.05), got


def _words(line: str) -> list[str]:
    words: list[str] = re.findall(r"[^\W\d_]{2,}", line)
    return [word for word in words if word not in tdecomp.registered()]


def _decimals(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


def test_pages_of_the_tutorial_have_the_same_set_up() -> None:
    tutorial = [page.read_text() for page in PAGES if page.parent.name == "learn"]
    tutorial = [page for page in tutorial if "def accuracy" in page]
    set_up = re.search(r"import torch\n.*?def accuracy.*?\n\n\n", tutorial[1], re.S)
    assert len(tutorial) == 7  # the page on time takes a larger network
    assert set_up is not None
    assert all(set_up[0] in page for page in tutorial)


def test_every_method_has_a_page() -> None:
    index = (ROOT / "docs/methods/index.md").read_text()
    assert all(f"| [`{name}`](" in index for name in tdecomp.registered())


def test_the_page_on_figures_names_every_command() -> None:
    page = (ROOT / "docs/figures.md").read_text()
    commands = {file.stem for file in (ROOT / "benchmarks").glob("*.py")} - {"__init__"}
    assert {name for name in commands if f"`{name}`" not in page} == set()


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
