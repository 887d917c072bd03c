"""Every public name is in the reference, with an example that runs and all its parameters."""

import doctest
import inspect
import re

import pytest

import tdecomp
import tdecomp.composer
from tests.docs.pages import ROOT

REFERENCE = "\n".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
PUBLIC = {
    f"{package.__name__}.{name}": getattr(package, name)
    for package in (tdecomp, tdecomp.composer)
    for name in package.__all__
}
# An entry of "Parameters" or "Attributes", alone or with others, or a mention.
EXPLAINED = r"^ *([\w, ]+, )?(\*\*)?{0}(, [\w, *]+)?( : |$)|`{0}`"


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_in_the_reference_once(name: str) -> None:
    assert len(re.findall(rf"^::: {re.escape(name)}$", REFERENCE, re.M)) == 1


# That the examples run, all of them, is a test of tests/test_public.py.
@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example(name: str) -> None:
    examples = doctest.DocTestParser().get_examples(PUBLIC[name].__doc__)
    assert any(doctest.SKIP not in example.options for example in examples)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_parameter_is_explained(name: str) -> None:
    described = PUBLIC[name]
    classes = inspect.getmro(described) if inspect.isclass(described) else [described]
    text = "\n".join(c.__doc__ or "" for c in classes if c.__module__.startswith("tdecomp"))
    if re.search("parameters\\s+are\\s+those\\s+of", text):
        return
    for parameter in inspect.signature(described).parameters.values():
        private = parameter.name.startswith("_") or parameter.kind is parameter.VAR_POSITIONAL
        assert private or re.search(EXPLAINED.format(parameter.name), text, re.M), parameter
