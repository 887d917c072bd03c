"""The distribution is tdecomp-torch: not mixed with another's files, and declares what it needs."""

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import tdecomp
from tdecomp._distribution import installed_version

PACKAGE = Path(tdecomp.__file__).parent
REMEDY = ("pip uninstall tdecomp,", "pip install --force-reinstall tdecomp-torch")


def record(folder: Path, name: str, *files: str) -> None:
    """Leave in a folder what installing a distribution with these files leaves there."""
    info = folder / f"{name.replace('-', '_')}-7.8.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 7.8\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def imported(folder: Path) -> subprocess.CompletedProcess[str]:
    """What `import tdecomp` does where the folder is the only one beside the standard library."""
    return subprocess.run(
        [sys.executable, "-S", "-c", "import tdecomp"],
        cwd=folder, env={}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_files_of_the_other_distribution_are_refused_before_anything_is_imported(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "tdecomp", ignore=shutil.ignore_patterns("__pycache__"))
    record(tmp_path, "tdecomp-torch", "tdecomp/__init__.py", "tdecomp/engine.py")
    record(tmp_path, "tdecomp", "tdecomp/__init__.py", "tdecomp/_base.py")
    stderr = imported(tmp_path).stderr
    assert "ImportError: " in stderr
    assert all(words in stderr for words in (str(tmp_path / "tdecomp"), *REMEDY))


def test_nothing_installed_says_what_to_install(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "tdecomp", ignore=shutil.ignore_patterns("__pycache__"))
    stderr = imported(tmp_path).stderr
    assert "ImportError: " in stderr
    assert all(words in stderr for words in (str(tmp_path), "pip install --editable ."))


def test_an_editable_install_under_the_earlier_name_is_no_mixture(tmp_path):
    record(
        tmp_path, "tdecomp", "__editable___tdecomp_0_1_0_finder.py", "tdecomp-7.8.dist-info/RECORD"
    )
    assert installed_version(tmp_path) == metadata.version("tdecomp-torch")


def test_what_a_build_left_in_a_checkout_is_no_mixture(tmp_path):
    sources = tmp_path / "tdecomp.egg-info"
    sources.mkdir()
    (sources / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: tdecomp\nVersion: 7.8\n")
    (sources / "SOURCES.txt").write_text("tdecomp/__init__.py\n")
    assert installed_version(tmp_path) == metadata.version("tdecomp-torch")


def test_the_other_distribution_in_another_folder_is_no_mixture(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    record(tmp_path, "tdecomp", "tdecomp/__init__.py")
    assert installed_version(PACKAGE.parent) == metadata.version("tdecomp-torch")
    with pytest.raises(ImportError, match="pip uninstall tdecomp"):
        installed_version(tmp_path)


def test_what_dependencies_import_without_declaring_it_is_declared_and_still_needed():
    # The pinned torch declares setuptools, so that the wheel's own environment would not miss it.
    code = "import sys, tdecomp; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    ).stdout.split()
    required = {
        re.match(r"[\w-]+", line)[0]
        for line in metadata.requires("tdecomp-torch")
        if "extra" not in line
    }
    for name in ("packaging", "setuptools"):
        assert name in loaded
        assert name in required
