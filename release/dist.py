"""What is uploaded: built, checked, and tried in a fresh environment.

python -m release.dist    writes dist/ and prints what the README's ten lines print
"""

import re
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from release.environment import ROOT, build, install, run

DIST = ROOT / "dist"


def ten_lines() -> str:
    """The README's first example."""
    found = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert found is not None
    return found[1]


def main() -> None:
    """Write dist/, replacing an earlier one."""
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    sdist, wheel = build(DIST)
    print(run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=ROOT), end="")
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        python = install(folder / "environment", wheel, constraints=ROOT / "constraints.txt")
        print(run(python, "-I", "-c", ten_lines(), cwd=folder), end="")


if __name__ == "__main__":
    main()
