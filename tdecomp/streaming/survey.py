"""Plans for a folder, and what its layers lose, from one tensor at a time; nothing is written."""

import os
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

from tdecomp.decomposers.base import Decomposer
from tdecomp.loss_curves.offers import able_sites
from tdecomp.loss_curves.sensitivity import Sensitivity, sensitivity_of
from tdecomp.model.filters import AtLeast, Filters
from tdecomp.plans.plan import Plan
from tdecomp.ranks.base import RankSelector
from tdecomp.ranks.budget import Budget
from tdecomp.runtime.progress import Progress
from tdecomp.runtime.torch_state import restoring
from tdecomp.streaming.choose import Asked, ask, offers_in, plan_folder
from tdecomp.streaming.jobs import Folders
from tdecomp.streaming.layers import FolderLayers, layers_of
from tdecomp.streaming.of_transformers import skeleton_of
from tdecomp.streaming.source import open_source

Folder = str | os.PathLike[str]


def refuse_for_folders(function: str, filters: Filters, **given: Any) -> None:
    """Raise a ValueError for the first argument that needs a model in memory."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise ValueError(
                f"{function}: {name} needs a model that can be called, got a folder with it; leave "
                "it out, or load the model and pass that"
            )
    if filters.where is not None and not isinstance(filters.where, AtLeast):
        raise ValueError(
            f"{function}: where is asked about modules, of which a folder has none; expected "
            "tdecomp.at_least(...), or include= and exclude= with names or globs"
        )


def planned_folder(
    folder: Folder,
    methods: Sequence[Decomposer],
    selector: RankSelector,
    filters: Filters,
    *,
    allow_expansion: bool,
    executor: Executor | None,
    progress: Progress,
) -> Plan:
    """The plan for a folder, with the errors to expect."""
    asked = Asked(methods, selector, expect=True, allow_expansion=allow_expansion)
    with restoring():
        found, folders = _opened(folder, filters, progress)
        return plan_folder(found, asked, folders, executor=executor, progress=progress).plan


def folder_sensitivity(
    folder: Folder,
    methods: Sequence[Decomposer],
    filters: Filters,
    *,
    executor: Executor | None,
    progress: Progress,
) -> Sensitivity:
    """What each layer of a folder loses at each rank, by each method."""
    # A budget is what curves are drawn for; its size plays no part in them.
    asked = Asked(methods, Budget(params=1.0))
    with restoring():
        found, folders = _opened(folder, filters, progress)
        sites = list(found.sites.values())
        able, left_alone = able_sites(sites, methods)
        known = ask(found, able, asked, folders, executor=executor, progress=progress)
        return sensitivity_of(sites, offers_in(able, known, rounded=False), left_alone)


def _opened(
    folder: Folder, filters: Filters, progress: Progress
) -> tuple[FolderLayers, Folders]:  # fmt: skip
    source = open_source(folder)
    with progress.step("look at the model"):
        found = layers_of(source, skeleton_of(source), filters)
    return found, Folders(str(source.folder.absolute()))
