"""What the files of a folder beside its weights say of its chains: `config.json` and README.md."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tdecomp._distribution import VERSION
from tdecomp.files.json_file import write_json
from tdecomp.files.typed import checked_format, typed
from tdecomp.files.whole_file import whole_file
from tdecomp.plans.plan import Plan
from tdecomp.plans.table import FORMAT

KEY = "quantization_config"  # where transformers looks for what has to be done before loading
METHOD = "tdecomp"
CONFIG, README = "config.json", "README.md"
_KIND = "decomposition"
_LOAD = (
    "import tdecomp.integrations.transformers (or diffusers) before from_pretrained, or "
    "tdecomp.load(folder, model) into a model of the undecomposed architecture"
)
_HEADING = "## Decomposed by tdecomp"


def description(plan: Plan, strides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The plan as plain data, as it stands in `config.json` under `KEY`.

    `strides` are those of tensors that are permuted in memory, by their names.

    >>> from tdecomp.checkpoint.description import description
    >>> plan = tdecomp.plan(nn.Linear(64, 32), "svd", rank=8, progress=False)
    >>> [*description(plan)]
    ['quant_method', 'format', 'version', 'load', 'plan']
    """
    about = {"quant_method": METHOD, "format": FORMAT, "version": VERSION, "load": _LOAD}
    return about | {"plan": plan.to_dict()} | ({"strides": dict(strides)} if strides else {})


def plan_in(described: Any) -> Plan:
    """The inverse of `description`; an error in words if it is damaged or of a newer version."""
    if described is None:
        raise ValueError(
            f"{CONFIG} has no {KEY}, so that nothing is decomposed there; expected a folder that "
            "tdecomp saved: others are loaded by their library alone"
        )
    data = typed(dict[str, Any], described, KEY)
    if data.get("quant_method") != METHOD:
        raise ValueError(
            f"{KEY} is of {data.get('quant_method')!r}; expected a model that tdecomp saved"
        )
    checked_format(data, _KIND, FORMAT)
    return Plan.from_dict(typed(dict[str, Any], data.get("plan"), "plan"))


def is_description(found: Any) -> bool:
    """Whether what a configuration has under `KEY` is that of a decomposed model."""
    held = found if isinstance(found, Mapping) else getattr(found, "__dict__", {})
    return bool(held.get("quant_method") == METHOD)


def read_config(folder: Path) -> dict[str, Any]:
    """The object in the folder's `config.json`; a ValueError names what is wrong with it."""
    file = folder / CONFIG
    if not file.is_file():
        raise ValueError(f"{folder} has no {CONFIG}; expected a folder that tdecomp saved")
    try:
        config: dict[str, Any] = typed(dict[str, Any], json.loads(file.read_bytes()), CONFIG)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    return config


def describe_in_config(folder: Path, *entries: Mapping[str, Any]) -> None:
    """Put a description, after other entries, into `config.json`, which may be a new one."""
    config = read_config(folder) if (folder / CONFIG).is_file() else {}
    *others, described = entries
    for new in others:
        config |= new
    config[KEY] = dict(described)
    write_json(folder / CONFIG, config)


def readme(architecture: str, library: str = "") -> str:
    """What a folder's README.md says: how a model of this class, of this library, is loaded.

    >>> from tdecomp.checkpoint.description import readme
    >>> "tdecomp.load" in readme("Net"), "from_pretrained" in readme("ViTModel", "transformers")
    (True, True)
    """
    how = _LOADING.get(library, _LOADING[""]).format(architecture=architecture)
    return f"""{_HEADING}

Some layers of this model are chains of smaller layers. `{CONFIG}` says which (`{KEY}`), and
`pip install tdecomp-torch` brings what loads them:

```python
{how}
```
{_WITHOUT.get(library, "")}"""


_LOADING = {
    "transformers": """import tdecomp.integrations.transformers  # before from_pretrained
from transformers import {architecture}

model = {architecture}.from_pretrained("this folder")""",
    "diffusers": """import tdecomp.integrations.diffusers  # before from_pretrained
from diffusers import {architecture}

model = {architecture}.from_pretrained("this folder")""",
    "timm": """import timm
import tdecomp

fresh = timm.create_model(...)  # of the architecture that was decomposed
model = tdecomp.load("this folder", fresh)""",
    "": """import tdecomp

fresh = {architecture}(...)  # as it was made before it was decomposed
model = tdecomp.load("this folder", fresh)""",
}
_WITHOUT = {
    "transformers": """
Without that import transformers warns of an unknown quantization type, and the weights of the
layers in chains are random.
"""
}


def write_readme(folder: Path, text: str) -> None:
    """Write the README, below what another one, such as a model card, says already."""
    file = folder / README
    # In whatever encoding the other text is, it stays as it is.
    bytewise = {"encoding": "utf-8", "errors": "surrogateescape"}
    before = file.read_text(**bytewise) if file.is_file() else ""
    others = before.partition(_HEADING)[0].rstrip()
    with whole_file(file) as draft:
        draft.write_text(f"{others}\n\n{text}".lstrip(), **bytewise)
