"""A method looks the same in every picture, and like no other one."""

import tdecomp
from tdecomp.pictures.style import largest, looks_of


def test_looks_are_the_same_whatever_else_is_drawn():
    alone, all_of_them = looks_of(["cp"]), looks_of(tdecomp.registered())
    assert alone["cp"] == all_of_them["cp"]
    for part in ("colour", "hatch", "marker", "dashes"):
        assert len({getattr(look, part) for look in all_of_them.values()}) == len(all_of_them)


def test_methods_of_ones_own_have_looks_too():
    looks = looks_of([f"mine{i}" for i in range(30)])
    assert len(set(looks.values())) == 30


def test_the_largest_keep_their_order():
    assert largest([5, 1, 9, 7, 2], float, 3) == [5, 9, 7]
