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
    assert tdecomp.__version__ == metadata.version("tdecomp")


def test_it_is_typed():
    assert resources.files("tdecomp").joinpath("py.typed").is_file()


def test_it_needs_a_python_that_it_runs_on():
    assert metadata.metadata("tdecomp")["Requires-Python"] == ">=3.11"


@pytest.mark.parametrize("name", ["tdecomp", "tdecomp.ranks", *MODULES])
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    # What an example may take for granted: it stands in the file that defines it.
    names = {**vars(torch), **vars(module), "torch": torch, "nn": torch.nn, "tdecomp": tdecomp}
    names |= {n: getattr(tdecomp, n) for n in tdecomp.__all__}
    from tdecomp.decomposers import registry

    before = dict(registry._REGISTRY)
    try:
        with torch.random.fork_rng():
            results = doctest.testmod(
                module, globs=names, optionflags=doctest.NORMALIZE_WHITESPACE, verbose=False
            )
    finally:
        registry._REGISTRY.clear()
        registry._REGISTRY.update(before)
    assert results.failed == 0


# Imports go one way ------------------------------------------------------------------------------

# A file imports only from the lines above its own, or from its own line in this order.
ORDER = (
    "layer", "chain", "cost", "filters", "tracing", "sites", "parallel", "sketch", "linalg",
    "regression", "patches", "batches", "augment",
    "moments.layer", "moments.accumulator", "moments.*", "moments",
    "calibration", "source",
    "decomposers.factors", "decomposers.base", "decomposers.registry", "decomposers.*",
    "decomposers",
    "ranks.base", "ranks.ladder", "ranks.evb", "ranks.spectral", "ranks.*", "ranks", "surgery",
    "latency.setting", "latency.timing", "latency.layers", "latency.profile", "latency.whole",
    "latency.measuring", "latency.pairs", "latency",
    "losses", "options", "candidates", "plotting", "report", "plans",
    "timed.in_model", "timed.prices", "timed.rehearsal", "timed.clock", "timed.choice", "timed",
    "planning",
    "recovery.base", "recovery.*", "recovery", "checkpoint", "engine", "progressive",
    "composer.closed_form", "composer.core", "composer.factorized", "composer.modules",
    "composer.apply", "composer",
)  # fmt: skip


def place(module):
    name = module.removeprefix("tdecomp.")
    if name in ORDER:
        return ORDER.index(name)
    return ORDER.index(f"{name.rpartition('.')[0]}.*")


def imported(module):
    path = Path(importlib.util.find_spec(module).origin)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "tdecomp":
            yield from (f"tdecomp.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tdecomp"):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("tdecomp"))


@pytest.mark.parametrize("module", [*MODULES, "tdecomp.ranks", "tdecomp.decomposers"])
def test_a_file_imports_only_from_files_above_it(module):
    for other in imported(module):
        assert other.removeprefix("tdecomp.") not in tdecomp.__all__, "for users only"
        above = place(other) < place(module)
        beside = place(other) == place(module) and ".".join(module.split(".")[:2]) in other
        assert above or beside, f"{module} imports {other}"


def test_files_of_one_line_import_each_other_one_way():
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
for name in ("matplotlib", "sklearn", "torchvision", "PIL", "onnx", "pytest", "nbclient"):
    sys.modules[name] = None
import tensorly, torch
before = torch.get_rng_state()
import tdecomp
result = tdecomp.decompose(torch.nn.Conv2d(16, 16, 3), "tucker2", rank=4, progress=False)
print(tensorly.get_backend(), result.report[""].rank, torch.equal(before, before))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:tdecomp", "-c", code],
        capture_output=True, text=True, check=False, cwd=ROOT.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:3] == ["numpy", "(4,", "4)"]
