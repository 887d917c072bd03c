"""Formulas as MathML, which browsers show without a script."""

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

_FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">(?P<latex>.*?)</(?P=tag)>', re.DOTALL)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Every formula that arithmatex has found in a page, as MathML."""

    def mathml(found: re.Match[str]) -> str:
        tag, latex = found["tag"], html.unescape(found["latex"]).strip()
        formula = convert(latex, display="block" if tag == "div" else "inline")
        if "\\" in formula:  # a command that the converter does not know
            raise PluginError(f"{page.file.src_uri}: no MathML for the formula {latex!r}")
        return f'<{tag} class="arithmatex">{formula}</{tag}>'

    return _FORMULA.sub(mathml, content)
