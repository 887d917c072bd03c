"""The installed distribution that these files belong to, ``tdecomp-torch``, and its version.

On the package index ``tdecomp`` is another project, whose package has the same import name. pip
lets both write into one folder, and what is then imported is made of files of either. So this
module is imported before every other one, and refuses such a mixture.
"""

from importlib import metadata
from pathlib import Path

_NAME = "tdecomp-torch"


def installed_version(folder: Path) -> str:
    """The version of the distribution whose package is in `folder`.

    An ImportError is raised if the other project's files are in it, too, or nothing is installed.
    """
    if _is_mixed(folder):
        raise ImportError(
            f"{folder / 'tdecomp'} also holds files of a distribution 'tdecomp' (another project, "
            f"or this one under its earlier name); expected those of '{_NAME}' alone: "
            f"pip uninstall tdecomp, then pip install --force-reinstall {_NAME} --no-deps"
        )
    try:
        return metadata.version(_NAME)
    except metadata.PackageNotFoundError:
        raise ImportError(
            f"tdecomp was found in {folder}, but its distribution '{_NAME}' is not installed "
            "(an editable install under its earlier name, 'tdecomp', is of no use any more); "
            "in a checkout: make install, or pip install --editable ."
        ) from None


def _is_mixed(folder: Path) -> bool:
    """Whether a distribution ``tdecomp`` has put files into the package.

    Only a RECORD tells: that of an editable install names no file of the package, and the
    ``egg-info`` that a build leaves in a checkout has sources in it, but none.
    """
    records = (
        found.read_text("RECORD") or ""
        for found in metadata.distributions(name="tdecomp", path=[str(folder)])
    )
    return any(line.startswith("tdecomp/") for record in records for line in record.splitlines())


VERSION = installed_version(Path(__file__).parents[1])
