"""What Markdown needs of docstrings: examples as blocks of code, public names as links."""

import re
from collections.abc import Iterator
from typing import Any

from griffe import Extension, GriffeLoader, Module, Object

_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)  # up to a blank line
_OPTION = re.compile(r" *# doctest: .*")
_TYPE = re.compile(r"^(?:[\w*, ]+ : |callable ).*``.*$", re.MULTILINE)  # shown as code as it is
_NAME = re.compile(r"(?<![`\[])`(?:tdecomp\.)?(\w+)`(?!`)")


class Docstrings(Extension):
    """Rewrite every docstring of the package once, before any is shown."""

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **_: Any) -> None:
        del loader
        public = {str(name) for name in pkg.exports or ()}

        def link(found: re.Match[str]) -> str:
            code, name = found[0], found[1]
            # Lower case without the package may be a parameter of the same name.
            sure = name[0].isupper() or code.startswith("`tdecomp.")
            return f"[{code}][tdecomp.{name}]" if name in public and sure else code

        for entry in _objects(pkg):
            if entry.docstring is not None:
                text = _EXAMPLE.sub(_fenced, entry.docstring.value)
                text = _TYPE.sub(lambda line: line[0].replace("``", ""), text)
                entry.docstring.value = _NAME.sub(link, text)


def _objects(entry: Object) -> Iterator[Object]:
    yield entry
    for member in entry.members.values():
        if not member.is_alias:
            yield from _objects(member)


def _fenced(example: re.Match[str]) -> str:
    return f"```pycon\n{_OPTION.sub('', example[0])}\n```"
