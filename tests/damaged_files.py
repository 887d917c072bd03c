"""Saved files and plans damaged at random: each is refused in words, or gives what is right."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import tdecomp
from tdecomp.decomposers.registry import listed_methods
from tdecomp.files.tensors import sealed
from tdecomp.model.example import Example
from tdecomp.model.sites import find_sites
from tdecomp.timing.measure import measure
from tests.damage import damage_bytes, damage_document, damage_tensors
from tests.models import MODELS
from tests.timing.fake_stopwatch import FakeStopwatch

QUIET = {"progress": False}
METHODS = ("svd", "lowrank", tdecomp.CP(n_iter_max=2))


@dataclass(frozen=True)
class Saved:
    """Something saved, and a check of what is read from it."""

    name: str
    content: bytes
    # Reads the file and uses what it read; `same` says that it has to be what was saved, which is
    # so unless the hash was made anew.
    read: Callable[[Path, bool], None]
    key: str | None = None  # of the document in the metadata of a safetensors file
    is_file: bool = True  # else a text

    def damaged(self, file: Path, rng: random.Random) -> bool:
        """Write the content with some damage; whether the hash fits to it."""
        kind = rng.choice(["document"] * 6 + ["bytes"] * 3 + ["tensors"])
        if kind == "bytes" or (kind == "tensors" and not self.key):
            file.write_bytes(damage_bytes(self.content, rng))
            return False
        if not self.key:
            file.write_text(damage_document(self.content.decode(), rng))
            return False
        file.write_bytes(self.content)
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        anew = rng.random() < 0.8
        if kind == "tensors":
            damage_tensors(tensors, rng)
        else:
            metadata[self.key] = damage_document(metadata[self.key], rng)
        if anew:
            with suppress(ValueError, TypeError, RecursionError):  # no document any more
                metadata[self.key] = sealed(json.loads(metadata[self.key]), tensors)
        save_file(tensors, file, metadata)
        return anew


def everything_saved(folder: Path) -> list[Saved]:
    """Checkpoints, plans, moments and profiles of several small models."""
    found = []
    for name in ("cnn", "nested", "twice", "linear"):
        case = MODELS[name]
        model, x, batches = case.build().eval(), case.inputs(), [case.inputs(8), case.inputs(6)]
        example, options = Example(x), {"example_inputs": x, **QUIET}
        times = measure(model, example, list(find_sites(model, None, example).values()),
                        listed_methods(METHODS), stopwatch=FakeStopwatch())  # fmt: skip
        moments = tdecomp.calibrate(model, batches, **QUIET)
        budget = tdecomp.decompose(model, METHODS, rank=tdecomp.Budget(macs=0.6), data=batches,
                                   recover=["refit"], **options)  # fmt: skip
        bare = tdecomp.decompose(model, METHODS, rank=2, allow_expansion=True, **QUIET)
        timed = tdecomp.plan(model, METHODS, rank=2, profile=times, **options)
        edited = next(row.name for row in timed if row.method)
        for result, kind in ((budget, "budget"), (bare, "bare")):
            file = folder / f"{name}-{kind}"
            result.save(file)
            read = _reads_checkpoint(result.model, case, x)
            found.append(Saved(f"checkpoint {file.name}", file.read_bytes(), read, "tdecomp"))
        for plan in (budget.plan, timed, timed.edit(edited, rank=1)):
            text = plan.to_json().encode()
            found.append(Saved(f"plan {name}", text, _reads_plan(model), is_file=False))
        moments.save(folder / "moments")
        found.append(Saved(f"moments {name}", (folder / "moments").read_bytes(),
                           _reads_moments(moments, model), "tdecomp_moments"))  # fmt: skip
        times.save(folder / "times")
        found.append(Saved(f"profile {name}", (folder / "times").read_bytes(),
                           _reads_profile(model, options)))  # fmt: skip
    return found


def _reads_checkpoint(saved: nn.Module, case: Any, x: Any) -> Callable[[Path, bool], None]:
    state = saved.state_dict()

    def read(file: Path, same: bool) -> None:
        loaded = tdecomp.load(file, case.build().eval())
        got = loaded.state_dict()
        assert list(got) == list(state)
        if same or all(got[key].dtype == value.dtype for key, value in state.items()):
            assert all(torch.equal(got[key], value) for key, value in state.items())
            torch.testing.assert_close(Example(x).run(loaded), Example(x).run(saved))
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                assert torch.equal(got[key], opened.get_tensor(key))

    return read


def _reads_plan(model: nn.Module) -> Callable[[Path, bool], None]:
    def read(file: Path, same: bool) -> None:
        del same
        plan = tdecomp.Plan.from_json(file.read_text("utf-8", "replace"))
        assert_figures(str(plan) + plan._repr_html_() + repr(plan))
        assert tdecomp.Plan.from_json(plan.to_json()).to_json() == plan.to_json()
        with refused_or_right("layer"):
            tdecomp.apply(model, plan, **QUIET)

    return read


def _reads_moments(saved: Any, model: nn.Module) -> Callable[[Path, bool], None]:
    def read(file: Path, same: bool) -> None:
        moments = tdecomp.Moments.load(file)
        repr(moments).encode()
        if same:
            assert (moments.samples, moments.peak_bytes) == (saved.samples, saved.peak_bytes)
            assert moments.unreached == saved.unreached
            assert [*moments] == [*saved]
        for name in moments.keys() & saved.keys():
            for part, tensor in saved[name].tensors().items():
                got = getattr(moments[name], part)
                alike = got is not None and got.dtype == tensor.dtype
                assert torch.equal(got, tensor) if alike else not same
        with refused_or_right("layer"):
            tdecomp.decompose(model, "svd", rank=2, data=moments, **QUIET)

    return read


def _reads_profile(model: nn.Module, options: Any) -> Callable[[Path, bool], None]:
    def read(file: Path, same: bool) -> None:
        del same
        times = tdecomp.Profile.load(file)
        assert_figures(str(times) + repr(times))
        times.save(file.with_suffix(".again"))
        assert tdecomp.Profile.load(file.with_suffix(".again")) == times
        with refused_or_right("profile"):
            tdecomp.plan(model, METHODS, rank=2, profile=replace(times, stopwatch=FakeStopwatch()),
                         **options)  # fmt: skip

    return read


def assert_figures(printed: str) -> None:
    """The text can be printed, and its numbers are numbers."""
    assert not re.search(r"\b(nan|inf)\b", printed)
    printed.encode()


@contextmanager
def refused_or_right(word: str) -> Iterator[None]:
    """A ValueError inside is right if it says what it is about."""
    try:
        yield
    except ValueError as error:
        if word not in str(error):
            raise


def check_damaged(count: int, folder: Path, seed: int = 0) -> Counter[tuple[str, str]]:
    """Damage `count` files; how many of each kind were refused and accepted."""
    rng, saved = random.Random(seed), everything_saved(folder)
    outcomes = Counter[tuple[str, str]]()
    file = folder / "damaged"
    for i in range(count):
        entry = saved[i % len(saved)]
        anew = entry.damaged(file, rng)
        kind, source = entry.name.split()[0], str(file) if entry.is_file else "plan: "
        try:
            entry.read(file, not anew)
            outcomes[kind, "accepted"] += 1
        except Exception as error:
            if type(error) is not ValueError or not str(error).startswith(source):
                error.add_note(f"{entry.name}, number {i} of seed {seed}")
                raise
            outcomes[kind, "refused"] += 1
    return outcomes
