"""Words of a command line as what they stand for; what cannot be read is said in words."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from tdecomp.decomposers.base import Decomposer
from tdecomp.decomposers.registry import listed_methods
from tdecomp.plans.plan import Plan
from tdecomp.ranks.base import RankSelector
from tdecomp.ranks.spelled import spelled_rank

Value = TypeVar("Value")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def readable(read: Callable[[str], Value]) -> Callable[[str], Value]:
    """The same with errors that argparse shows with all of their words."""

    def reading(text: str) -> Value:
        try:
            return read(text)
        except (ValueError, OSError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return reading


def layer_rank(text: str) -> tuple[str, RankSelector]:
    """The names, or glob, and the rank in a text such as ``*.down_proj=0.5``."""
    pattern, equals, rank = text.partition("=")
    if not (pattern and equals):
        raise ValueError(f"expected a layer's name or a glob, = and a rank, got {text!r}")
    return pattern, spelled_rank(rank)


def methods(text: str) -> list[Decomposer]:
    """The methods in a text such as ``svd,lowrank``."""
    return listed_methods(text.split(",") if "," in text else text)


def memory_size(text: str) -> int:
    """The bytes in a text such as ``4GB``.

    >>> from tdecomp.streaming.command.arguments import memory_size
    >>> memory_size("4GB"), memory_size("1.5 GiB")
    (4000000000, 1610612736)
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?i?B)", text, re.IGNORECASE | re.ASCII)
    if found is None or (nbytes := int(float(found[1]) * _UNITS[found[2].upper()])) < 1:
        raise ValueError(f"expected a size with its unit, such as 500MB, 4GB or 4GiB, got {text!r}")
    return nbytes


def device(text: str) -> torch.device:
    """The device of this name, if it can be used here."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # also where torch was built without CUDA
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"device {text!r} cannot be used here: {reason}") from error


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch("[0-9]{1,9}", text, re.ASCII) or int(text) < 1:
        raise ValueError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def plan_in(text: str) -> Plan:
    """The plan in the file of this name."""
    file = Path(text)
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    try:
        return Plan.from_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def new_file(text: str) -> Path:
    """A file that can be written, looked at before the work that fills it."""
    file = Path(text)
    if file.is_dir() or not file.parent.is_dir():
        raise ValueError(f"expected the name of a file in a folder that exists, got {text!r}")
    return file
