"""Plain data as values of known types, and what is refused, by its place."""

import json
from dataclasses import dataclass
from typing import Any

import pytest

from tdecomp.files.typed import parsed, typed


@dataclass(frozen=True)
class Size:
    batch: int
    sides: tuple[int, ...] = ()

    def __post_init__(self):
        if self.batch < 0:
            raise ValueError(f"a batch of {self.batch}")


@dataclass(frozen=True)
class Record:
    name: str
    rank: int | tuple[int, ...] | None
    share: float
    sizes: tuple[Size, ...] | None
    options: dict[str, dict[str, Any]]


PLAIN = {
    "name": "fc",
    "rank": [2, 3],
    "share": 1,
    "sizes": [{"batch": 1, "sides": [4, 4]}, {"batch": 2, "sides": []}],
    "options": {"cp": {"tol": 1e-3, "anything": [None]}},
}
RECORD = Record("fc", (2, 3), 1, (Size(1, (4, 4)), Size(2)), PLAIN["options"])


def test_lists_become_tuples_and_objects_records():
    assert typed(Record, json.loads(json.dumps(PLAIN)), "row") == RECORD


def test_numbers_may_be_as_large_as_floats_are():
    assert typed(Record, {**PLAIN, "share": 1e300}, "row").share == 1e300


@pytest.mark.parametrize(
    "change, words",
    [
        ({"name": None}, r"row\.name: expected a text, got None"),
        ({"name": "\ud800"}, "surrogates"),
        ({"rank": True}, r"row\.rank: expected a whole number or a list or null, got True"),
        ({"rank": 2.0}, r"row\.rank: expected .* got 2\.0"),
        ({"rank": [2, "3"]}, r"row\.rank\[1\]: expected a whole number, got '3'"),
        ({"rank": 2**63}, r"row\.rank: expected .* got 9223372036854775808"),
        ({"share": float("nan")}, r"row\.share: expected a number, got nan"),
        ({"share": float("inf")}, r"row\.share: expected a number, got inf"),
        ({"share": False}, r"row\.share: expected a number, got False"),
        ({"sizes": [{"batch": 1}]}, r"row\.sizes\[0\]: entries missing or unknown: \['sides'\]"),
        ({"sizes": [[1, []]]}, r"row\.sizes\[0\]: expected an object, got \[1, \[\]\]"),
        ({"sizes": [{"batch": -1, "sides": []}]}, r"row\.sizes\[0\]: a batch of -1"),
        ({"options": {"cp": 3}}, r"row\.options\.cp: expected an object, got 3"),
        ({"more": 1}, r"row: entries missing or unknown: \['more'\]"),
    ],
)
def test_anything_else_is_refused_with_its_place(change, words):
    with pytest.raises((TypeError, ValueError), match=words):
        typed(Record, {**PLAIN, **change}, "row")


def test_every_entry_has_to_be_there():
    for name in PLAIN:
        with pytest.raises(TypeError, match=rf"row: entries missing or unknown: \['{name}'\]"):
            typed(Record, {key: value for key, value in PLAIN.items() if key != name}, "row")


@pytest.mark.parametrize("text", ["", "{", "\x00", "[" * 10_000, "1" * 5000, b"\xff\xfe\xfa"])
def test_text_that_is_no_json(text):
    with pytest.raises(ValueError, match=r"^not JSON: "):
        parsed(text, "plan", 2)


@pytest.mark.parametrize(
    "data, words",
    [
        ([], "plan: expected an object"),
        ({"format": True}, "format: expected a whole number, got True"),
        ({"format": 1}, r"plan format 1, written by tdecomp 0\.1: .*reads format 2; make it anew"),
        ({"format": 3, "version": "9.8"}, r"plan format 3, written by tdecomp 9\.8.*update"),
        ({"format": 3, "version": [1]}, "plan format 3, written by tdecomp later.*update"),
    ],
)
def test_data_of_another_format(data, words):
    with pytest.raises((TypeError, ValueError), match=words):
        parsed(json.dumps(data), "plan", 2)
