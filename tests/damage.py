"""Damage at random: to JSON texts, to bytes and to the tensors of a file."""

import json
import random
from collections.abc import Iterator
from typing import Any

import torch


class Raw(str):
    """A piece of JSON as it is to be written, such as 1e400."""


class Entries(list[list[Any]]):
    """The keys and values of an object, in which a key can stand twice."""


def parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=lambda pairs: Entries(map(list, pairs)))


def written(node: Any) -> str:
    if isinstance(node, Raw):
        return str(node)
    if isinstance(node, Entries):
        return "{" + ", ".join(f"{json.dumps(key)}: {written(v)}" for key, v in node) + "}"
    if isinstance(node, list):
        return "[" + ", ".join(map(written, node)) + "]"
    return json.dumps(node)


VALUES = [
    "null", "true", "false", "0", "-1", "1", "2", "1.5", "-0.0", "NaN", "Infinity", "-Infinity",
    "1e400", "1e300", "1e-300", "4611686018427387904", "1" + "0" * 30, "1" * 5000, '""', '"x"',
    '"same"', '"svd"', '"\\ud800"', "[]", "[[]]", "[0]", "[1, 2, 3, 4]", "{}", '{"a": 1}',
    "[" * 10_000 + "]" * 10_000, '{"a":' * 10_000 + "1" + "}" * 10_000, "[" * 600 + "]" * 600,
]  # fmt: skip


def damage_document(text: str, rng: random.Random) -> str:
    """The JSON text with one to three values, keys or lists that are not as they were."""
    document = parsed(text)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = list(_places(document))
        holder, at, key = rng.choice(places)
        value = _get(holder, at)
        alike = [place for place in places if place[2] == key and place[0] is not holder]
        action = rng.choice(["value", "value", "value", "number", "drop", "twice", "key", "swap"])
        if action == "swap" and alike:
            other, there, _ = rng.choice(alike)
            _set(holder, at, _get(other, there))
            _set(other, there, value)
        elif action == "number" and type(value) in (int, float):
            _set(holder, at, value + rng.choice([-1, 1, 1000, 0.5, -2 * value]))
        elif action == "drop":
            del holder[at]
        elif action == "twice":
            holder.insert(at, holder[at])
        elif action == "key" and isinstance(holder, Entries):
            holder[at] = [rng.choice(["", "x", key + "x", rng.choice(holder)[0]]), value]
        else:
            _set(holder, at, Raw(rng.choice(VALUES)))
    return written(document)


def _places(node: Any, key: str = "") -> Iterator[tuple[Any, int, str]]:
    """Each value in a document: what holds it, where, and its key or that of its list."""
    if isinstance(node, list):
        for at, item in enumerate(node):
            name, value = item if isinstance(node, Entries) else (key, item)
            yield node, at, name
            yield from _places(value, name)


def _get(holder: Any, at: int) -> Any:
    return holder[at][1] if isinstance(holder, Entries) else holder[at]


def _set(holder: Any, at: int, value: Any) -> None:
    holder[at] = [holder[at][0], value] if isinstance(holder, Entries) else value


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Some bytes flipped, zeroed, lost or added, or another file altogether."""
    at = rng.choice([rng.randrange(len(content)), rng.randrange(min(len(content), 4000))])
    return rng.choice([
        content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :],
        content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :],
        content[:at] + b"\0" * 64 + content[at + 64 :],
        content[:at] + content[at + 1 :],
        content[:at],
        content + b"\n{}",
        rng.choice([b"", b"{}", b"[]", b"PK\3\4", b"\xff\xfe", content[::-1]]),
    ])  # fmt: skip


def damage_tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    """One of the tensors lost, renamed, added or not as it was."""
    name = rng.choice([*tensors])
    value = tensors.pop(name)
    dtype = rng.choice([torch.int64, torch.float64, torch.complex64, torch.float8_e4m3fn])
    changed = rng.choice([
        value.flatten(), value[None], value.to(dtype), value.flatten()[:1], value.new_empty(0),
    ])  # fmt: skip
    action = rng.choice(["lost", "renamed", "added", "changed", "changed"])
    if action != "lost":
        tensors[f"{name}x" if action == "renamed" else name] = (
            changed.clone() if action == "changed" else value
        )
    if action == "added":
        tensors[f"{name}.more"] = value.clone()
