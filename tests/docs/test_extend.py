"""The method of the page on methods passes the suite of all methods, by the test that it shows."""

import re
import sys
from types import ModuleType

from tdecomp.decomposers.registry import unregister
from tests.docs.pages import ROOT, blocks

PAGE = ROOT / "docs/extend/method.md"
(_TEST,) = re.findall(r'^```py title="tests/.*\n((?:.*\n)*?)```', PAGE.read_text(), re.M)

# The two classes as the reader's package, which the shown test imports.
_module = ModuleType("my_package.tucker1")
sys.modules["my_package.tucker1"] = _module
for _block, _ in zip(blocks(PAGE), range(2), strict=False):
    _block.run(_module.__dict__)
unregister("tucker1")  # other tests see the library's methods alone

exec(compile(_TEST, PAGE, "exec"), globals())
