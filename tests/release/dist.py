"""What is uploaded: built, checked, and tried in a fresh environment.

python -m tests.release.dist    writes dist/ and prints what the README's ten lines print
"""

import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.readme import FIRST
from tests.release.environment import ROOT, build, install, run

DIST = ROOT / "dist"


def main() -> None:
    """Write dist/, replacing an earlier one."""
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    sdist, wheel = build(DIST)
    print(run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=ROOT), end="")
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        python = install(folder / "environment", wheel, constraints=ROOT / "constraints.txt")
        print(run(python, "-I", "-c", FIRST, cwd=folder), end="")


if __name__ == "__main__":
    main()
