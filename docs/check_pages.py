"""Open the built site and a page of a report in Debian's chromium; list what is wrong.

    apt-get install chromium
    make check-pages

What is counted, at two widths: dead links, pictures without a text or that do not load, errors on
the console, requests to the network, and pages that scroll sideways. Pages are opened as files,
as by somebody who was sent the folder; the search is tried there and from a server. Links to other
sites are not followed.
"""

import argparse
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import torch
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright
from playwright.sync_api import TimeoutError as PlaywrightTimeout
from torch import nn

import tdecomp

WIDTHS = (400, 1280)
PICTURES = """[...document.images].filter(i => !i.alt.trim() || !i.naturalWidth).map(i => i.src)"""
SIDEWAYS = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
LINKS = "[...document.links].map(a => a.href)"
IDS = "[...document.querySelectorAll('[id],a[name]')].map(e => e.id || e.name)"

Fault = tuple[str, str]  # what is wrong, and where


class Look:
    """One opened page, and what went wrong while it loaded."""

    def __init__(self, page: Page, name: str) -> None:
        self.page, self.name = page, name
        self.faults: list[Fault] = []
        page.on("console", self._console)
        page.on("pageerror", lambda error: self._fault("error on the console", error))
        page.on("request", self._request)
        page.on("requestfailed", lambda request: self._fault("file that is missing", request.url))

    def _fault(self, kind: str, what: object) -> None:
        self.faults.append((kind, f"{self.name}: {what}"))

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self._fault("error on the console", message.text)

    def _request(self, request: Request) -> None:
        there = urlparse(request.url)
        if there.scheme in ("http", "https") and there.hostname != "127.0.0.1":
            self._fault("request to the network", request.url)

    def judge(self, width: int) -> None:
        """Look at what a window of this width shows."""
        self.page.set_viewport_size({"width": width, "height": 900})
        for picture in self.page.evaluate(PICTURES):
            self._fault("picture without a text, or broken", picture)
        try:  # menus that slide away are gone after a moment
            self.page.wait_for_function(f"{SIDEWAYS} <= 0", timeout=2000)
        except PlaywrightTimeout:
            wider = self.page.evaluate(SIDEWAYS)
            self._fault("page that scrolls sideways", f"{wider} pixels at a width of {width}")


@contextmanager
def opened(browser: Browser, url: str, name: str) -> Iterator[Look]:
    """A page that has loaded."""
    page = browser.new_page()
    look = Look(page, name)
    page.goto(url, wait_until="load")
    yield look
    page.close()


def look_at(browser: Browser, files: list[Path], shots: Path | None) -> Iterator[Fault]:
    """Every file at every width, then the links from all of them."""
    links: dict[tuple[Path, str], str] = {}
    ids: dict[Path, set[str]] = {}
    for file in files:
        with opened(browser, file.as_uri(), str(file)) as look:
            for width in WIDTHS:
                look.judge(width)
                if shots:
                    look.page.screenshot(
                        path=shots / f"{file.parent.name}-{file.stem}-{width}.png", full_page=True
                    )
            ids[file] = set(look.page.evaluate(IDS))
            for link in look.page.evaluate(LINKS):
                address, fragment = urldefrag(link)
                if address.startswith("file:"):
                    target = Path(unquote(urlparse(address).path))
                    links[target, unquote(fragment)] = str(file)
        yield from look.faults
    for (target, fragment), source in links.items():
        if not target.is_file() or (fragment and fragment not in ids.get(target, ())):
            yield "dead link", f"{source}: {target}#{fragment}"


def search(browser: Browser, url: str) -> Iterator[Fault]:
    """Whether the search finds the name of a method."""
    with opened(browser, url, "search") as look:
        look.page.locator("input.md-search__input").press_sequentially("tucker2")
        try:
            look.page.locator(".md-search-result__item").first.wait_for(state="attached")
        except PlaywrightTimeout:
            yield "search that finds nothing", url
    yield from look.faults


def report(folder: Path) -> Path:
    """What `to_html` writes of a decomposed network."""
    layers = [nn.Conv2d(8, 16, 3), *(nn.Conv2d(16, 16, 3, padding=1) for _ in range(60))]
    model, x = nn.Sequential(*layers), torch.ones(1, 8, 16, 16)
    result = tdecomp.decompose(model, "dense", rank=0.25, example_inputs=x, progress=False)
    result.report.to_html(folder / "report.html")
    return folder / "report.html"


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server for this folder, on this machine only."""
    handler = partial(QuietHandler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/index.html"
    server.shutdown()
    server.server_close()


class QuietHandler(SimpleHTTPRequestHandler):
    """Without a line for every request."""

    def log_message(self, *_: object) -> None: ...


def main() -> None:
    """Print each fault and how many there are of each kind; exit with 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--site", type=Path, default=Path("site"))
    parser.add_argument("--screenshots", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        parser.error("chromium is not installed: apt-get install chromium")
    site = options.site.resolve()
    # 404.html is for servers: its links begin at their root.
    pages = (page for page in sorted(site.rglob("*.html")) if page.name != "404.html")
    if options.screenshots:
        options.screenshots.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        sync_playwright() as playwright,
        served(site) as address,
    ):
        files = [*pages, report(Path(folder))]
        browser = playwright.chromium.launch(executable_path=chromium)
        faults = [*look_at(browser, files, options.screenshots)]
        for url in ((site / "index.html").as_uri(), address):
            faults += search(browser, url)
        browser.close()
    for kind, where in sorted(faults):
        print(f"{kind}: {where}")
    counts = Counter(kind for kind, _ in faults)
    words = ", ".join(f"{kind}: {n}" for kind, n in counts.items()) or "no fault"
    print(f"{len(files)} pages at widths {', '.join(map(str, WIDTHS))}: {words}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
