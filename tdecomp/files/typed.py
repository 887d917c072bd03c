"""Values of known types from the plain data of a JSON text, which may be damaged."""

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

# The types that a value of plain data may have where this is not the expected type alone.
_FORMS: dict[Any, tuple[type, ...]] = {float: (float, int), tuple: (list, tuple)}
_IN_WORDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a text",
    NoneType: "null", tuple: "a list", dict: "an object",
}  # fmt: skip


def parsed(text: str | bytes, kind: str, form: int, *, oldest: int | None = None) -> dict[str, Any]:
    """The JSON object in a text; refuses one whose `format` is not `form`, in words.

    With an `oldest` format, that one and those between are read, too.
    """
    try:
        data: dict[str, Any] = typed(dict[str, Any], json.loads(text), kind)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    checked_format(data, kind, form, oldest=oldest)
    return data


def checked_format(
    data: Mapping[str, Any], kind: str, form: int, *, oldest: int | None = None
) -> None:
    """Refuse data whose `format` is not `form`, nor between that and the `oldest`, in words."""
    if "format" not in data:
        raise ValueError(f"format: it has none, so that it is no {kind} of tdecomp; expected one")
    found = typed(int, data.get("format"), "format")
    if not (form if oldest is None else oldest) <= found <= form:
        version, remedy = ("0.1", "make it anew") if found < form else ("later", "update tdecomp")
        version = data["version"] if isinstance(data.get("version"), str) else version
        raise ValueError(
            f"{kind} format {found}, written by tdecomp {version}: this version reads format "
            f"{form}; {remedy}"
        )


def typed(hint: Any, value: Any, place: str) -> Any:
    """The value as one of a type: lists become tuples, and objects dataclasses.

    >>> from tdecomp.files.typed import typed
    >>> typed(tuple[str, ...] | None, ["fc", "head"], "names")
    ('fc', 'head')

    Unions, tuples, dicts, dataclasses (all of their fields have to be there, but for those that
    their attribute `later` names), plain types and Any. Anything else is a TypeError that says
    where it was, as are numbers that are not finite and whole ones beyond 64 bits.
    """
    if hint is Any:
        return value
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kind = next((k for k in kinds if type(value) in _FORMS.get(_base(k), (_base(k),))), None)
    number, most = isinstance(value, (int, float)), math.inf if type(value) is float else 2**63
    if kind is None or (number and not abs(value) < most):
        expected = " or ".join(_IN_WORDS[_base(kind)] for kind in kinds)
        raise TypeError(f"{place}: expected {expected}, got {reprlib.repr(value)}")
    if is_dataclass(kind):
        return _record(kind, value, place)
    if isinstance(value, dict):
        key_kind, kind = get_args(kind)
        return {
            typed(key_kind, key, place): typed(kind, entry, f"{place}.{key}")
            for key, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        kinds = get_args(kind)
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value)
        if len(kinds) != len(value):
            raise TypeError(f"{place}: expected {len(kinds)} entries, got {reprlib.repr(value)}")
        pairs = enumerate(zip(kinds, value, strict=True))
        return tuple(typed(kind, entry, f"{place}[{i}]") for i, (kind, entry) in pairs)
    if isinstance(value, str):
        value.encode()  # refuses half a surrogate pair, which nothing can print
    return value


def _base(kind: Any) -> Any:
    return dict if is_dataclass(kind) else get_origin(kind) or kind


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind) if field.init}


def _record(kind: Any, value: Any, place: str) -> Any:
    hints = _hints(kind)
    later = {name for name in getattr(kind, "later", ()) if name not in value}
    hints = {name: hint for name, hint in hints.items() if name not in later}
    if value.keys() != hints.keys():
        wrong = reprlib.repr(sorted(map(str, hints.keys() ^ value.keys())))
        raise TypeError(f"{place}: entries missing or unknown: {wrong}")
    entries = {name: typed(hint, value[name], f"{place}.{name}") for name, hint in hints.items()}
    try:
        return kind(**entries)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
