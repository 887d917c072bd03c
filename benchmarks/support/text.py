"""Text that every Python installation has: the docstrings of its standard library, as bytes."""

import ast
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

LENGTH = 128  # tokens of a sequence
TOKENS = 128  # ASCII; 0, which no docstring holds, begins a sequence and pads it
_LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages"}
_SHORTEST = 32
_EVERY = 10  # the number of files of which one is kept for validation


@dataclass(frozen=True)
class Text:
    """Sequences (n, LENGTH) of tokens, padded at the end, to train on and to judge by."""

    train: Tensor
    val: Tensor


def docstrings() -> Text:
    """The docstrings in the order of their files, the longer ones in pieces."""
    train: list[bytes] = []
    val: list[bytes] = []
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in root.rglob("*.py") if not _LEFT_OUT & {*f.relative_to(root).parts}]
    for number, file in enumerate(sorted(files)):
        (train if number % _EVERY else val).extend(_pieces(file))
    return Text(_as_tokens(train), _as_tokens(val))


def _pieces(file: Path) -> list[bytes]:
    with warnings.catch_warnings(action="ignore"):  # of escapes in old code
        nodes = ast.walk(ast.parse(file.read_bytes()))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented)]
    joined = [" ".join(text.split()).encode("ascii", "replace") for text in texts]
    size = LENGTH - 1  # after the token that begins a sequence
    pieces = [text[at : at + size] for text in joined for at in range(0, len(text), size)]
    return [piece for piece in pieces if len(piece) >= _SHORTEST]


def _as_tokens(pieces: list[bytes]) -> Tensor:
    rows = torch.zeros(len(pieces), LENGTH, dtype=torch.long)
    for row, piece in zip(rows, pieces, strict=True):
        row[1 : 1 + len(piece)] = torch.tensor(list(piece))
    return rows


def counted(tokens: Tensor) -> Tensor:
    """Which tokens of a batch (n, length) count: all but the padding at the end."""
    beginning = torch.zeros_like(tokens, dtype=torch.bool)
    beginning[:, 0] = True
    return beginning | (tokens > 0)
