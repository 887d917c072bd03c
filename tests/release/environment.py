"""Distributions built from a copy of the checkout, and fresh environments to install them into."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
LEFT_BY_EARLIER_BUILDS = (".*", "build", "dist", "results", "site", "*.egg-info", "__pycache__")


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints; a RuntimeError with all of it if the command fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(words)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from the sdist, in a folder."""
    with TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        # From a copy: files that an earlier build left in the checkout would get in.
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*LEFT_BY_EARLIER_BUILDS))
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def install(environment: Path, *packages: str | Path, constraints: Path) -> Path:
    """The interpreter of a new environment with these packages and what they need.

    Not even pip is in it, as pip would bring setuptools along.
    """
    where = environment.parent
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=where)
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    # Most of what is installed is never imported, so it need not be compiled.
    run(*pip, "install", "--no-compile", "--constraint", constraints, *packages, cwd=where)
    return python
