"""Run notebooks from a fresh kernel and keep their outputs.

python notebooks/execute.py                     all of them
python notebooks/execute.py notebooks/01*.ipynb
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
TIMEOUT = 600  # seconds, of one cell


def run(notebook: NotebookNode, environment: Mapping[str, str] | None = None) -> None:
    """Fill in the outputs of a notebook, run in its folder; an error in a cell is raised."""
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        record_timing=False,
        kernel_name=KERNEL["name"],
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute(env=os.environ | dict(environment or {}))
    # The kernel writes its exact version here, which would change with every machine.
    notebook.metadata = NotebookNode(kernelspec=KERNEL, language_info={"name": "python"})


def main(paths: list[Path]) -> None:
    """Run the notebooks and write them back."""
    for path in paths or sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        run(notebook)
        nbformat.validate(notebook)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
