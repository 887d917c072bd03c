"""What Markdown needs of docstrings: examples as blocks of code, public names as links."""

import builtins
import doctest
import re
from collections.abc import Callable, Iterator
from typing import Any

from griffe import (
    DocstringSectionKind,
    ExprTuple,
    Extension,
    GriffeLoader,
    Module,
    Object,
    ParameterKind,
)

_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)  # up to a blank line
_OPTION = re.compile(r" *# doctest: .*")
_TYPE = re.compile(r"^(?:[\w*, ]+ : |callable ).*``.*$", re.MULTILINE)  # shown as code as it is
_NAME = re.compile(r"(?<![`\[])`(?:tdecomp\.)?(\w+)`(?!`)")
_WRITTEN = re.compile(r"^([\w*]+(?:, [\w*]+)*) : (.*)$", re.MULTILINE)
_NAMED = (DocstringSectionKind.parameters, DocstringSectionKind.attributes)
_STARRED = (ParameterKind.var_positional, ParameterKind.var_keyword)


class Docstrings(Extension):
    """Rewrite every docstring of the package once, before any is shown."""

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **_: Any) -> None:
        del loader
        public = {str(name) for name in pkg.exports or ()}

        for entry in _objects(pkg):
            if entry.docstring is not None:
                text = _EXAMPLE.sub(_fenced, entry.docstring.value)
                text = _TYPE.sub(lambda line: line[0].replace("``", ""), text)
                entry.docstring.value = _NAME.sub(_link(entry, public), text)
                _as_they_are(entry)

    def on_module(self, *, mod: Module, loader: GriffeLoader, **_: Any) -> None:
        """Rewrite signatures, once dataclasses have theirs: they get them after `on_package`."""
        del loader
        public = {str(name) for name in mod.package.exports or ()}
        for entry in _objects(mod) if mod.parent is None else ():
            _without_private_names(entry, public)


def _link(entry: Object, public: set[str]) -> Callable[[re.Match[str]], str]:
    """What makes links of public names, unless the entry has a parameter of that name."""
    own = {entry.name, *_signature(entry), *(_signature(entry.parent) if entry.parent else ())}

    def linked(found: re.Match[str]) -> str:
        code, name = found[0], found[1]
        sure = name not in own or code.startswith("`tdecomp.")
        return f"[{code}][tdecomp.{name}]" if name in public and sure else code

    return linked


def _as_they_are(entry: Object) -> None:
    """Give each documented name its own type and default, as the signature or the text has them.

    Griffe gives all names of ``a, b`` those of the first, ``{"x", "y"}`` the default "x", and
    reads a type in words with a comma as a tuple.
    """
    assert entry.docstring is not None
    own = _signature(entry)
    written = dict(_WRITTEN.findall(entry.docstring.value))
    for section in entry.docstring.parsed:
        for item in section.value if section.kind in _NAMED else ():
            if any(item.annotation is annotation for annotation, _ in own.values()):
                item.annotation = own.get(item.name, (item.annotation, None))[0]
            elif isinstance(item.annotation, ExprTuple):
                texts = (text for names, text in written.items() if item.name in names.split(", "))
                item.annotation = next(texts, item.annotation)
            name = item.name.lstrip("*")
            if name in own and section.kind is DocstringSectionKind.parameters:
                item.value = own[name][1]


def _without_private_names(entry: Object, public: set[str]) -> None:
    """Leave private parameters out of a signature, and write `...` for defaults that are private.

    A parameter whose default were left out would look as if it had to be given.
    """
    parameters = getattr(entry, "parameters", ())
    for parameter in [*parameters]:
        default = str(parameter.default)
        hidden = default.isidentifier() and not hasattr(builtins, default)
        if parameter.name.startswith("_") and parameter.default is not None:
            del parameters[parameter.name]
        elif hidden and default not in public:
            parameter.default = "..."


def _signature(entry: Object) -> dict[str, tuple[Any, Any]]:
    """The annotation and the default of each parameter, or of each field of a dataclass."""
    if entry.is_class and "__init__" not in entry.members:
        # With those of the dataclasses that it is based on.
        fields = (member for member in entry.all_members.values() if member.is_attribute)
        return {field.name: (field.annotation, _default(field.value)) for field in fields}
    function = entry.members["__init__"] if entry.is_class else entry
    parameters = getattr(function, "parameters", ())
    return {p.name: (p.annotation, None if p.kind in _STARRED else p.default) for p in parameters}


def _default(value: Any) -> Any:
    """The default of a field, where it is written as ``field(default=..., ...)``."""
    given = getattr(value, "arguments", ()) if str(value).startswith("field(") else ()
    return next((a.value for a in given if getattr(a, "name", "") == "default"), value)


def _objects(entry: Object) -> Iterator[Object]:
    yield entry
    for member in entry.members.values():
        if not member.is_alias:
            yield from _objects(member)


def _fenced(example: re.Match[str]) -> str:
    """Code that can be copied as it is, and what it prints in a block of its own."""
    blocks, code = [], ""
    for part in doctest.DocTestParser().get_examples(example[0] + "\n"):
        code += _OPTION.sub("", part.source)
        if part.want:
            blocks += [f"```python\n{code}```", f"```text\n{part.want}```"]
            code = ""
    return "\n\n".join([*blocks, *([f"```python\n{code}```"] if code else [])])
