"""Measurements on this machine, and who needs none of them."""

import ast
import importlib.util
from pathlib import Path

import numpy as np

from tdecomp.timing.speed import Quartiles
from tdecomp.timing.stopwatch import interleaved, ratio


def test_quartiles_and_spread():
    time = Quartiles.over(np.array([5.0, 1.0, 4.0, 2.0, 3.0]))
    assert (time.low, time.median, time.high) == (2.0, 3.0, 4.0)
    assert time.spread == 2 / 3


def test_a_ratio_is_taken_within_each_round():
    # A machine that is twice as slow in every other round: the ratio does not scatter at all.
    seconds = np.array([[1.0, 3.0], [2.0, 6.0], [1.0, 3.0], [2.0, 6.0]])
    assert ratio(seconds, 1, 0) == Quartiles(3.0, 3.0, 3.0)


def test_every_function_has_its_turn_in_every_round():
    order = []
    seconds = interleaved([lambda i=i: order.append(i) for i in range(3)], rounds=4, min_block=1e-9)
    assert seconds.shape == (4, 3)
    assert (seconds > 0).all()
    # Whole runs of one function, every other round in reverse order.
    turns = [i for i, before in zip(order, [None, *order], strict=False) if i != before]
    assert turns == [0, 1, 2, 0, 1, 2, 1, 0, 1, 2, 1, 0]


def test_more_work_takes_longer():
    small, large = np.ones((8, 8)), np.ones((400, 400))
    seconds = interleaved([lambda: small @ small, lambda: large @ large], rounds=3, min_block=1e-3)
    assert ratio(seconds, 1, 0).median > 1


def test_reading_a_plan_imports_no_stopwatch():
    """Neither `plans.plan` nor anything that it imports, directly or not."""
    left, seen = ["tdecomp.plans.plan"], set()
    while left:
        module = left.pop()
        seen.add(module)
        tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tdecomp."):
                left += {node.module} - seen
    assert {name for name in seen if ".timing." in name} == {"tdecomp.timing.speed"}
