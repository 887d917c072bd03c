"""What the reference's pages say of parameters: their own defaults, and something of each."""

import inspect
from itertools import chain
from typing import Any

import griffe
import pytest

from tests.docs.pages import ROOT
from tests.docs.test_reference import PUBLIC

PARAMETERS = griffe.DocstringSectionKind.parameters
LISTS = {
    PARAMETERS, griffe.DocstringSectionKind.attributes,
    griffe.DocstringSectionKind.returns, griffe.DocstringSectionKind.raises,
}  # fmt: skip
STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@pytest.fixture(scope="module")
def package() -> Any:
    hook = griffe.load_extensions(str(ROOT / "docs/hooks/docstrings.py"))
    return griffe.load("tdecomp", search_paths=[ROOT], extensions=hook, docstring_parser="numpy")


def documented(package: Any, name: str) -> Any:
    found = package[name.removeprefix("tdecomp.")]
    return found.final_target if found.is_alias else found


def sections(entry: Any) -> list[Any]:
    return entry.docstring.parsed if entry.docstring is not None else []


@pytest.mark.parametrize("name", PUBLIC)
def test_each_parameter_has_its_default(package: Any, name: str) -> None:
    own = inspect.signature(PUBLIC[name]).parameters
    lists = [s.value for s in sections(documented(package, name)) if s.kind is PARAMETERS]
    for item in chain.from_iterable(lists):
        parameter = own[item.name.lstrip("*")]
        if parameter.kind in STARRED or parameter.default is parameter.empty:
            assert item.value is None, item.name
            continue
        assert item.value is not None, item.name
        if callable(parameter.default):
            assert str(item.value) == parameter.default.__name__, item.name
        else:
            assert eval(str(item.value), {}) == parameter.default, item.name


@pytest.mark.parametrize("name", PUBLIC)
def test_nothing_is_listed_without_a_word(package: Any, name: str) -> None:
    entry = documented(package, name)
    members = entry.members.values() if entry.is_class else ()
    for described in (entry, *(m for m in members if not m.is_alias)):
        for section in sections(described):
            for item in section.value if section.kind in LISTS else ():
                assert item.description.strip(), f"{described.path}: {item}"


@pytest.mark.parametrize("name", PUBLIC)
def test_signatures_show_no_private_name(package: Any, name: str) -> None:
    for described in _signatures(documented(package, name)):
        for parameter in described.parameters:
            assert not (parameter.name.startswith("_") and parameter.default is not None)
            assert not str(parameter.default).startswith("_"), described.path
            assert str(parameter.default) not in ("THIS_MACHINE", "NOTHING"), described.path


def _signatures(entry: Any) -> list[Any]:
    own = [entry, *(m for m in entry.members.values() if not m.is_alias)]
    return [described for described in own if hasattr(described, "parameters")]
