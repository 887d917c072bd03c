"""A folder of safetensors as it is published: which tensors it has, and where they lie."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tdecomp.checkpoint.description import CONFIG, KEY, METHOD, read_config
from tdecomp.files.index import INDEX_SUFFIX, NAMES, Headers, read_headers, read_index
from tdecomp.files.shards import Stored
from tdecomp.plans.table import FORMAT

_SUFFIX = ".safetensors"
# Files with the same weights again, in other forms.
_SAME_WEIGHTS = (
    "*.safetensors", "*.index.json", "pytorch_model*.bin", "consolidated*", "tf_model*.h5",
    "flax_model*.msgpack",
)  # fmt: skip
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")


@dataclass(frozen=True)
class Source:
    """A folder with weights.

    Attributes
    ----------
    folder : Path
    config : dict
        What its config.json says.
    tensors : mapping of str to Stored
        By its name where each tensor lies, in the order of the files.
    shards : tuple of str
        The names of the files that hold them.
    marks : dict of str to list
        By the name of each of these files its size, when it was changed, and a hash of its header.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    shards: tuple[str, ...]
    marks: Mapping[str, list[Any]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(stored.nbytes for stored in self.tensors.values())

    @property
    def quantizer(self) -> str | None:
        """The method by which it says to be quantized; None if it is not."""
        said = self.config.get(KEY)
        return str(said.get("quant_method", "unknown")) if isinstance(said, dict) else None

    @property
    def written_name(self) -> str:
        """The name of a single file with weights where the library of this model looks for it."""
        return NAMES["_class_name" in self.config]  # which diffusers writes

    def other_files(self) -> list[str]:
        """The files, also in folders, that have nothing to do with weights."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        names = [path.relative_to(self.folder) for path in paths if path != self.folder / CONFIG]
        shown = [name for name in names if not any(part.startswith(".") for part in name.parts)]
        return [
            name.as_posix() for name in shown
            if len(name.parts) > 1 or not any(map(name.match, _SAME_WEIGHTS))
        ]  # fmt: skip


def open_source(folder: str | os.PathLike[str]) -> Source:
    """Look at a folder of safetensors that is to be decomposed.

    A FileNotFoundError where files are missing, a ValueError where they are damaged, do not fit
    together, or are none that can be decomposed; both name the file.
    """
    source = open_folder(folder)
    if not (source.folder / CONFIG).is_file():
        raise FileNotFoundError(f"{source.folder}: no {CONFIG}, which says what the model is")
    _refuse_decomposed(source)
    return source


def open_folder(folder: str | os.PathLike[str]) -> Source:
    """Look at any folder of safetensors: its config, its index and the headers of its files."""
    root = folder_at(folder, "source")
    if not root.is_dir():
        raise FileNotFoundError(
            f"no such folder: {root}; expected one with *.safetensors and config.json, as "
            "huggingface_hub.snapshot_download(...) returns it"
        )
    headers = _headers(root)
    marks: dict[str, list[Any]] = {}
    for file, text in headers.texts.items():
        stat = (root / file).stat()
        marks[file] = [stat.st_size, stat.st_mtime_ns, hashlib.sha256(text).hexdigest()]
    return Source(root, config_in(root), headers.tensors, tuple(marks), marks)


def folder_at(path: str | os.PathLike[str], argument: str) -> Path:
    """The folder that a user names, be it below their home (~); a TypeError for anything else."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"{argument}: expected the name of a folder, got {type(path).__name__}; a model in "
            "memory is for tdecomp.decompose"
        )
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # nobody has that name
        raise FileNotFoundError(f"{argument}: no such folder: {path} ({error})") from error


def _headers(root: Path) -> Headers:
    """Those of the files with weights, as an index names them, or of the only one."""
    indices = sorted(path.name for path in root.glob(f"*{_SUFFIX}{INDEX_SUFFIX}"))
    if len(indices) > 1:
        raise ValueError(
            f"{root}: it has several indices, {', '.join(indices)}; expected the files of one model"
        )
    if indices:
        return read_index(root / indices[0])
    names = sorted(path.name for path in root.glob(f"*{_SUFFIX}"))
    # Beside a file of such a name the others hold what is no state, or the same once more.
    single = [name for name in NAMES if name in names] or (names if len(names) == 1 else [])
    if single:
        return read_headers(root, single[:1])
    if names:
        raise ValueError(
            f"{root}: {len(names)} files of safetensors without {NAMES[0]}{INDEX_SUFFIX}, which "
            "says where each tensor lies; download it, too, or keep one of the files in the folder"
        )
    pickled = sorted(path.name for path in root.iterdir() if path.suffix in PICKLED)
    if pickled:
        raise ValueError(
            f"{root}: its weights are pickled ({pickled[0]}), which runs code when it is read; "
            "expected safetensors: model.save_pretrained(folder) writes them"
        )
    inner = sorted(path.parent.name for path in root.glob(f"*/{CONFIG}"))
    words = f"one of its folders: {', '.join(inner)}" if inner else "a folder with weights"
    raise FileNotFoundError(f"{root}: no *.safetensors; expected {words}")


def config_in(folder: Path) -> dict[str, Any]:
    """What the config.json of a folder says; nothing if there is none."""
    return read_config(folder) if (folder / CONFIG).is_file() else {}


def _refuse_decomposed(source: Source) -> None:
    if source.quantizer == METHOD:
        said = source.config[KEY]
        form = said.get("format")
        if isinstance(form, int) and form > FORMAT:
            raise ValueError(
                f"{source.folder}: decomposed by tdecomp {said.get('version', 'later')}, in format "
                f"{form}; this version knows format {FORMAT}: update tdecomp"
            )
        raise ValueError(
            f"{source.folder}: it is decomposed already; expected the original: a stream starts "
            "from whole layers. tdecomp.reduce_ranks lowers the ranks of a decomposed model"
        )
