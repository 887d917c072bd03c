"""The names, the version, the docstrings' examples, and which file may import which."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import pytest
import torch

import tdecomp
import tdecomp.composer
from benchmarks.support.torchvision_import import import_torchvision

ROOT = Path(tdecomp.__file__).parent
MODULES = sorted(
    info.name for info in pkgutil.walk_packages([str(ROOT)], "tdecomp.") if not info.ispkg
)


def test_every_public_name_exists_and_is_documented():
    assert tdecomp.__all__ == sorted(set(tdecomp.__all__), key=tdecomp.__all__.index)
    for name in tdecomp.__all__:
        assert inspect.getdoc(getattr(tdecomp, name)), name


def test_names_that_issues_and_readme_use():
    for name in (
        "decompose", "plan", "apply", "register", "Plan", "Report", "Ratio", "VBMF", "Energy",
        "Decomposer",
    ):  # fmt: skip
        assert name in tdecomp.__all__
    assert set(tdecomp.registered()) >= {"svd", "cp", "cp-separable", "tucker2", "lowrank"}


def test_version():
    assert tdecomp.__version__ == metadata.version("tdecomp-torch")


def test_it_is_typed():
    assert resources.files("tdecomp").joinpath("py.typed").is_file()


def test_it_needs_a_python_that_it_runs_on():
    assert metadata.metadata("tdecomp-torch")["Requires-Python"] == ">=3.11"


def importable(module):
    """Whether the library is there of which it is an integration, such as transformers."""
    integration = module.partition("tdecomp.integrations.")[2]
    return not integration or importlib.util.find_spec(integration.partition(".")[0]) is not None


@pytest.mark.usefixtures("own_methods")
@pytest.mark.parametrize("name", ["tdecomp", *filter(importable, MODULES)])
def test_examples_in_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some save files
    if "integrations" in name:
        import_torchvision()  # which these libraries import, too
    module = importlib.import_module(name)
    # What an example may take for granted, as the first page of the reference says.
    package = tdecomp.composer if name.startswith("tdecomp.composer") else tdecomp
    names = {"torch": torch, "nn": torch.nn, "tdecomp": tdecomp}
    names |= {n: getattr(package, n) for n in package.__all__}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        results = doctest.testmod(
            module, globs=names, optionflags=doctest.NORMALIZE_WHITESPACE, verbose=False
        )
    assert results.failed == 0


# Imports go one way ------------------------------------------------------------------------------

# A file imports from its own room and from the rooms on the lines above its own.
ORDER = """
_distribution runtime files
layers linalg
model
calibration decomposers
ranks
pictures
loss_curves
timing
plans
recovery checkpoint integrations
result pipeline
afterwards streaming
api quality composer
__main__
"""
ROOMS = [line.split() for line in ORDER.strip().splitlines()]


def room(module):
    return module.split(".")[1]


def place(module):
    return next(i for i, line in enumerate(ROOMS) if room(module) in line)


def imported(module):
    path = Path(importlib.util.find_spec(module).origin)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "tdecomp":
            yield from (f"tdecomp.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tdecomp"):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("tdecomp"))


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_only_from_rooms_above_its_own(module):
    for other in imported(module):
        assert other.removeprefix("tdecomp.") not in tdecomp.__all__, "for users only"
        assert place(other) <= place(module), f"{module} imports {other}"


def test_every_room_has_its_place():
    found = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert found - {"__init__", "__pycache__"} == {name for line in ROOMS for name in line}
    assert len(found - {"__pycache__"}) <= 25


def test_the_page_for_contributors_lists_every_room():
    rooms = (ROOT.parent / "docs/contributing.md").read_text().partition("## Rooms")[2]
    for name in (name for line in ROOMS for name in line):
        file = f"{name}.py" if (ROOT / f"{name}.py").exists() else f"{name}/"
        assert f"`{file}`" in rooms, file


def test_no_imports_go_round_in_circles():
    edges = {m: set(imported(m)) for m in MODULES}

    def reach(module, seen):
        for other in edges.get(module, ()):
            assert other not in seen, f"{' → '.join([*seen, other])}"
            reach(other, (*seen, other))

    for module in MODULES:
        reach(module, (module,))


def test_importing_needs_no_extra_and_sets_no_backend():
    code = """
import sys
for name in (
    "matplotlib", "sklearn", "torchvision", "PIL", "onnx", "pytest", "nbclient", "transformers",
    "diffusers", "timm", "huggingface_hub",
):
    sys.modules[name] = None
import tensorly, torch
before = torch.get_rng_state()
import tdecomp
result = tdecomp.decompose(
    torch.nn.Conv2d(16, 16, 3), "tucker2", rank=4, example_inputs=torch.ones(1, 16, 5, 5),
    progress=False,
)
print(tensorly.get_backend(), result.report[""].rank, torch.equal(before, before))
assert "torch._dynamo" not in sys.modules  # seconds, and 0.1 GB, for nothing
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:tdecomp", "-c", code],
        capture_output=True, text=True, check=False, cwd=ROOT.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:3] == ["numpy", "(4,", "4)"]
