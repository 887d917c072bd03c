"""Lets `save_pretrained` of other libraries write every chain of a model, whoever put it there.

A part may have been decomposed by itself, and put into a larger model or changed where it stands
in one. That model's configuration then knows nothing of the chains, and the part knows no model:
only where the whole is saved is it known. No library is imported here.
"""

import functools
import inspect
import sys
from typing import Any

from tdecomp.checkpoint.pretrained import saying_chains

_BASES = {
    "transformers.modeling_utils": "PreTrainedModel",
    "diffusers.models.modeling_utils": "ModelMixin",
}


def teach_imported() -> None:
    """`teach` the libraries that are imported by now."""
    for module, name in _BASES.items():
        base = getattr(sys.modules.get(module), name, None)
        if base is not None:
            teach(base)


def teach(base: Any) -> None:
    """Let models of a class and its subclasses say their chains where they are saved.

    Those without chains are saved as before.
    """
    save = base.save_pretrained
    if hasattr(save, "says_chains"):
        return

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **options: Any) -> Any:
        given = inspect.signature(save).bind(self, *args, **options).arguments
        with saying_chains(self, given.get("state_dict")):
            return save(self, *args, **options)

    vars(save_pretrained)["says_chains"] = True
    base.save_pretrained = save_pretrained
