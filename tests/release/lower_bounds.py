"""The lowest versions that setup.cfg allows, tried: the README's ten lines, and quick tests.

python -m tests.release.lower_bounds    takes minutes and downloads about a gigabyte

pip looks for packages where its own variables say: PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS with a
build of torch for CPUs saves most of the download. The models of the extra `zoo` are left out.
"""

import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement

from tests.readme import FIRST
from tests.release.environment import ROOT, build, install, run

EXTRAS = ("plot", "notebooks", "onnx", "benchmarks")
TEST_TOOLS = ("pytest", "pytest-cov", "pytest-xdist", "hypothesis")

# The public surface, and what most depends on the release of torch.
TESTS = ("tests/test_public.py", "tests/checkpoint/test_file.py", "tests/test_pipeline.py")
TESTS += ("tests/plans", "tests/layers", "tests/recovery/test_refit.py")
TESTS += ("tests/recovery/test_distill.py", "tests/recovery/test_reconstruct.py")


def lowest(setup: str) -> Iterator[str]:
    """``name==version`` for each lower bound of the package and of the extras."""
    parser = ConfigParser()
    parser.read_string(setup)
    listed = [parser["options"]["install_requires"]]
    listed += [parser["options.extras_require"][extra] for extra in EXTRAS]
    for line in "\n".join(listed).split("\n"):
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            bounds = [bound for bound in requirement.specifier if bound.operator == ">="]
            yield from (f"{requirement.name}=={bound.version}" for bound in bounds)


def main() -> int:
    """The exit status of the tests."""
    pins = sorted(set(lowest((ROOT / "setup.cfg").read_text())))
    print(f"Python {sys.version.split()[0]}:", *pins)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(pins))
        _, wheel = build(folder)
        wanted = f"{wheel}[{','.join(EXTRAS)}]"
        python = install(folder / "environment", wanted, *TEST_TOOLS, constraints=constraints)
        print(run(python, "-I", "-c", FIRST, cwd=folder), end="")
        # The sources are the wheel's; only the checkout has the tests. Old releases warn of each
        # other, which is no fault of the package.
        options = ("-q", "-n", "auto", "-o", "filterwarnings=", "-m", "not slow and not soak")
        tests: tuple[str | Path, ...] = (python, "-m", "pytest", *options, *TESTS)
        return subprocess.run(tests, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
