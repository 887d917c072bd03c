"""The README's ten lines print what stands below them and on the first page."""

import contextlib
import io

from tests.docs.pages import ROOT
from tests.readme import FIRST, OUTPUT, prints_the_output


def test_the_ten_lines_print_what_the_readme_shows() -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(FIRST, {})
    assert prints_the_output(printed.getvalue()), printed.getvalue()


def test_the_first_page_of_the_site_shows_the_same() -> None:
    page = (ROOT / "docs/index.md").read_text()
    assert f"```python\n{FIRST}```" in page
    assert f"```text\n{OUTPUT}```" in page


def test_it_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100
