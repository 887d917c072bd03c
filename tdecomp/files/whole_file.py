"""Files that are written wholly or not at all, and whose faults are told with their name."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(file: str | os.PathLike[str]) -> Iterator[Path]:
    """A draft to write, which takes the file's place at the end; on an error nothing changes."""
    target = Path(os.path.realpath(file))  # a link stays one
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {target.parent}")
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; expected the name of a file in it")
    draft = target.with_name(f".{uuid.uuid4().hex}.draft")  # however long the name
    try:
        yield draft
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def named_in_errors(source: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever is wrong with what is read inside is a ValueError that names the source."""
    try:
        yield
    except (TypeError, ValueError) as error:
        place, words = os.fspath(source), str(error)
        named = words.startswith(place)  # or a file in it
        raise ValueError(words if named else f"{place}: {words}") from error
