"""Plain data in files of JSON."""

import json
import os
from pathlib import Path
from typing import Any

from tdecomp.files.whole_file import whole_file


def write_json(path: Path, data: Any) -> None:
    """Write plain data, wholly or not at all; not even a power cut takes it away afterwards."""
    with whole_file(path) as draft, draft.open("w", encoding="utf-8") as opened:
        opened.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        opened.flush()
        os.fsync(opened.fileno())


def read_json(path: Path) -> Any:
    """What a file of plain data holds; None if there is none."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else None
