"""The wheel and the dependencies it declares, in an environment of their own, are enough.

The one test that lets pip fetch packages: what is not declared can only be missed where nothing
else is installed.
"""

import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import blocks
from tests.readme import FIRST, OUTPUT, prints_the_output
from tests.release.environment import ROOT, build, install, run

pytestmark = pytest.mark.slow

IMPORT_ALL = """
import importlib, pkgutil
for found in pkgutil.walk_packages(tdecomp.__path__, "tdecomp."):
    try:
        importlib.import_module(found.name)
    except ModuleNotFoundError as error:
        # An extra installs the first; whoever imports an integration has its library.
        if error.name not in ("matplotlib", "transformers", "diffusers"):
            raise
print(tdecomp.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))[1]


@pytest.fixture(scope="module")
def python(wheel: Path) -> Iterator[Path]:
    environment = wheel.parent / "environment"
    yield install(environment, wheel, constraints=ROOT / "constraints.txt")
    shutil.rmtree(environment)  # 1 GB


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    assert wheel.name.startswith("tdecomp_torch-")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "tdecomp/py.typed" in names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {
        "tdecomp",
        "tdecomp_torch",
    }


def test_examples_that_need_no_checkout_run_and_print_what_the_readme_shows(
    python: Path, tmp_path: Path
) -> None:
    pages = (ROOT / f"docs/reference/{page}.md" for page in ("decompose", "time", "composer"))
    examples = (block.code for page in pages for block in blocks(page))
    code = "\n".join((FIRST, *examples, IMPORT_ALL))
    printed = run(python, "-I", "-c", code, cwd=tmp_path).splitlines()
    lines = len(OUTPUT.splitlines())
    assert prints_the_output("\n".join(printed[:lines])), printed
    assert Path(printed[-1]).is_relative_to(python.parents[1])


def test_the_command_is_installed(python: Path, tmp_path: Path) -> None:
    assert run(python.with_name("tdecomp"), "--version", cwd=tmp_path).startswith("tdecomp ")
