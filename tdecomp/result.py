"""What decomposing gives: the model, its report and its plan."""

import os
from dataclasses import dataclass
from typing import Any

from torch import nn

from tdecomp.checkpoint import file as single_file
from tdecomp.checkpoint.save import save_pretrained
from tdecomp.plans.plan import Plan
from tdecomp.plans.report import Report


@dataclass(frozen=True)
class Decomposition:
    """The decomposed model, and what was done to each layer.

    >>> result = tdecomp.decompose(nn.Linear(64, 64), "svd", rank=8, progress=False)
    >>> result.report.after.params, tuple(result.model[0].weight.shape)
    (1088, (8, 64))

    Attributes
    ----------
    model : nn.Module
        A copy, or the model that was given if it was changed in place.
    report : Report
        What was done to each layer, and what it cost.
    plan : Plan
        The methods and ranks that the model has.
    """

    model: nn.Module
    report: Report
    plan: Plan

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the weights and the plan to one safetensors file; `tdecomp.load` reads it.

        >>> result.save("small.safetensors")  # doctest: +SKIP

        A ValueError is raised if it could not be loaded again, as where its state dict holds
        something that is not a tensor, a FileNotFoundError if the file's folder does not exist.
        """
        single_file.save(file, self.model, self.plan)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        max_shard_size: int | str = "5GB",
        **options: Any,
    ) -> None:
        """Write a folder as Hugging Face's libraries have them, which they or `tdecomp.load` read.

        >>> result.save_pretrained("small", tokenizer=tokenizer)  # doctest: +SKIP
        >>> import tdecomp.integrations.transformers  # doctest: +SKIP
        >>> AutoModelForCausalLM.from_pretrained("small")  # doctest: +SKIP

        Safetensors files with an index, `config.json` with the plan, and a README.md that says how
        the folder is loaded. For models of transformers and diffusers their own `save_pretrained`
        writes it, which does so also when it is called plainly: the configuration of the result's
        model says the plan. Tensors have the names that they have in the model. Files of others in
        the folder stay.

        Parameters
        ----------
        folder : path
            Made if there is none.
        tokenizer : tokenizer or processor, optional
            Whose `save_pretrained` writes its files beside the weights.
        max_shard_size : int or str
            The bytes of one file at most, as a number or such as "5GB".
        **options
            For the model's own `save_pretrained`.

        Raises
        ------
        ValueError
            With the remedy, if what would be written could not be loaded again: adapters that are
            not merged, batch norm that was folded in, weights that were quantized, methods that are
            not registered.
        TypeError
            If the tokenizer has no `save_pretrained`, or the model none that takes the options.
        """
        if tokenizer is not None and not callable(getattr(tokenizer, "save_pretrained", None)):
            words = "expected a tokenizer or processor, which has a save_pretrained"
            raise TypeError(f"tokenizer: {words}, got {type(tokenizer).__name__}")
        save_pretrained(self.model, self.plan, folder, max_shard_size, options)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
