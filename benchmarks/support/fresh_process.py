"""Measuring in a process of its own, which nothing else has warmed up."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


def in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """``function(*arguments)`` in a new interpreter; all of them can be pickled."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def in_this_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """The same without the seconds that a new interpreter takes, where nothing is measured."""
    return function(*arguments)
