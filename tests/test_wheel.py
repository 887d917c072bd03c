"""The wheel and the dependencies it declares, in an environment of their own, are enough.

The one test that lets pip fetch packages: what is not declared can only be missed where nothing
else is installed.
"""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import blocks
from tests.readme import FIRST, OUTPUT, prints_the_output

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]

IMPORT_ALL = """
import importlib, pkgutil
for found in pkgutil.walk_packages(tdecomp.__path__, "tdecomp."):
    try:
        importlib.import_module(found.name)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":  # which an extra installs
            raise
print(tdecomp.__file__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: files that an earlier build left in the checkout would get in."""
    folder = tmp_path_factory.mktemp("wheel")
    leave = shutil.ignore_patterns(".*", "build", "dist", "results", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=leave)
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder)
    run(*build, folder / "source", cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path) -> Iterator[Path]:
    """The interpreter of an environment without even pip, as pip would bring setuptools along."""
    environment = wheel.parent / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=wheel.parent)
    interpreter = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", interpreter)
    pinned = ("--constraint", ROOT / "constraints.txt")
    # Most of what is installed is never imported, so it need not be compiled.
    run(*pip, "install", "--no-compile", *pinned, wheel, cwd=wheel.parent)
    yield interpreter
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
