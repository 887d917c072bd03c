"""Calls in a pool of threads, on one model or on several, against the same calls in turn."""

import copy
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

import tdecomp
from tests.calls import BUDGET, METHODS, QUIET, Case, in_training, transformer, wide
from tests.unchanged import all_unchanged, same_state


def decompose(s, draw):
    rank, recover = draw.choice([1, 2, 3, 4, 0.3, 0.5]), draw.choice([(), "refit"])
    return partial(
        tdecomp.decompose, s.model, draw.choice(["svd", "lowrank", METHODS]), rank=rank,
        data=s.batches, recover=recover, seed=draw.choice([None, 3, 4]), **QUIET,
    )  # fmt: skip


def decompose_in_place(s, draw):
    copies = [copy.deepcopy(s.model) for _ in range(2)]  # one for each time that it is called
    options = {"rank": draw.choice([2, 3]), "data": s.batches, "recover": "refit", **QUIET}
    return lambda: tdecomp.decompose(copies.pop(), "svd", inplace=True, **options)


def timed(s, _):
    return partial(tdecomp.decompose, s.model, METHODS, **BUDGET, **QUIET)


def plan(s, draw):
    rank = draw.choice([2, 0.5, "vbmf", tdecomp.Energy(draw.uniform(0.5, 0.99))])
    return partial(tdecomp.plan, s.model, METHODS, rank=rank, data=s.batches, **QUIET)


def budget(s, draw):
    rank = tdecomp.Budget(params=draw.uniform(0.6, 0.9))
    return partial(tdecomp.plan, s.model, METHODS, **{**BUDGET, "rank": rank}, **QUIET)


def calibrate(s, draw):
    memory = draw.choice([None, 10**6])
    return partial(tdecomp.calibrate, s.model, s.batches, max_memory=memory, **QUIET)


def refit(s, draw):
    smaller = tdecomp.decompose(s.model, "svd", rank=draw.choice([1, 2, 3]), **QUIET).model
    return partial(tdecomp.refit, smaller, s.model, s.batches, **QUIET)


def recalibrate(s, draw):
    smaller = tdecomp.decompose(s.model, "svd", rank=draw.choice([1, 2, 3]), **QUIET).model
    return partial(tdecomp.recalibrate_batchnorm, smaller, s.batches, original=s.model, **QUIET)


def distill(s, draw):
    smaller = tdecomp.decompose(s.model, "svd", rank=draw.choice([1, 2, 3]), **QUIET).model
    options = {"steps": 2, "seed": draw.choice([None, 3, 4]), **QUIET}
    return partial(tdecomp.distill, smaller, s.model, s.batches, **options)


def sweep(seed, calls=4):
    """One sweep; an AssertionError says which call's result was another one, or what leaked."""
    draw = random.Random(seed)
    build = draw.choice([in_training, in_training, transformer, wide])
    subjects = [Case(None, build).subject() for _ in range(draw.choice([1, 3]))]
    kinds = [decompose, decompose_in_place, plan, calibrate, refit, distill]
    kinds += [budget, recalibrate, timed] * (build is in_training)
    drawn = [draw.choice(kinds) for _ in range(calls)]
    chosen = [kind(draw.choice(subjects), draw) for kind in drawn]
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(draw.choice([1, 1, 2]))
    torch.set_float32_matmul_precision(draw.choice(["highest", "medium"]))
    try:
        wanted = [_plain(call()) for call in chosen]
        alive = threading.active_count()
        models = [s.model for s in subjects]
        pool = ThreadPoolExecutor(draw.choice([2, 4]))
        with all_unchanged(*models, *(s.batches for s in subjects)), pool:
            futures = [pool.submit(call) for call in chosen]
            found = [_plain(future.result(timeout=120)) for future in futures]
        assert threading.active_count() == alive
        for kind, one, other in zip(drawn, wanted, found, strict=True):
            assert same_state(one, other), f"sweep {seed}: {kind.__name__} differs in a thread"
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])


def _plain(result):
    """What a call found, as tensors and plain data."""
    if isinstance(result, tdecomp.Plan):
        return result.to_dict()
    if isinstance(result, tdecomp.Moments):
        return {n: (layer.mean, layer.matrix, layer.count) for n, layer in result.layers.items()}
    plan = result.plan.to_dict() if isinstance(result, tdecomp.Decomposition) else {}
    modes = tuple((name, m.training) for name, m in result.model.named_modules())
    return {**result.model.state_dict(), **plan, "modes": modes}
