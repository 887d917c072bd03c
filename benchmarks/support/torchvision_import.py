"""The one place that imports torchvision.

A torchvision wheel built for another variant of torch (one with CUDA beside one without, say)
cannot load its compiled operators, and its import then fails on their missing schemas, although
the models need none of them.
"""

import functools
import importlib
import importlib.machinery
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@functools.cache
def import_torchvision() -> ModuleType:
    """Return torchvision; where its operators cannot be loaded, declare their schemas first."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "torchvision is not installed; it comes with pip install 'tdecomp-torch[benchmarks]'"
        )
    if not _load_operators(Path(spec.origin).parent):
        _declare_schemas()
    return importlib.import_module("torchvision")


def _load_operators(package: Path) -> bool:
    """Load torchvision's compiled operators as its own import would; whether that worked."""
    if _operators_known():
        return True
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        library = package / f"_C{suffix}"
        if library.exists():
            try:
                torch.ops.load_library(str(library))
            except OSError:  # built for another torch
                continue
            return True
    return False


def _operators_known() -> bool:
    return hasattr(torch.ops.torchvision, "nms")


@functools.cache
def _declare_schemas() -> torch.library.Library:
    """Declare the operators without an implementation; the library has to outlive its operators."""
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    return library
