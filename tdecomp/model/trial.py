"""Whether a model runs with the chains in place, and which ones it fails with."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tdecomp.layers.chain import Chain
from tdecomp.model.batches import tensors_of
from tdecomp.model.fast_path import switched_on_again
from tdecomp.model.kept import KeptParameters
from tdecomp.model.surgery import copy_with, swap
from tdecomp.model.trace import READ_OUTSIDE, Reads
from tdecomp.model.weights import is_lazy
from tdecomp.runtime.scope import Scope
from tdecomp.runtime.torch_state import evaluating, hooks, no_fast_path

Run = Callable[[nn.Module], Any]


def broken_layers(
    model: nn.Module,
    chains: Mapping[nn.Module, Chain],
    runs: Sequence[Run],
    *,
    inplace: bool,
    ran: Collection[nn.Module] | None,
) -> dict[nn.Module, str]:
    """The layers that the model does not run without, with the reasons.

    Each of `runs` calls it once, in the mode that it is in. `ran` are the layers that take part, if
    that is known. The model stays as it is; with `inplace` its chains are in place meanwhile.
    """
    # Those that a copy of the model would not hold.
    copied = set() if inplace else set(copy_with(model, chains, share=True).modules())
    reasons = {m: _COPIED for m, chain in chains.items() if not inplace and chain not in copied}
    trial = _Trial(model, runs, inplace)
    known = False  # whether the model itself makes these runs
    while trial.runs and (tried := {m: c for m, c in chains.items() if m not in reasons}):
        try:
            reached = trial.run(tried)
        except _Used as used:
            reasons[used.layer] = used.reason
        except Exception as failure:
            if known:
                layer, error = trial.first_failing(tried, failure)
                problem = f"{type(error).__name__}: {error}".rstrip(": ").splitlines()[0]
                broken = f"the model does not run with its chain: {problem}"
                reasons[layer] = error.reason if isinstance(error, _Used) else broken
            else:
                trial.drop_what_the_model_fails_at()
                known = True
        else:
            missed = tried.keys() - reached
            if ran is not None:
                missed &= set(ran)
            if missed:  # in train mode a model may skip layers that it runs in eval mode
                missed &= trial.run({}, watched=missed)
            if not missed:
                return reasons
            reasons |= dict.fromkeys(missed, _PASSED_BY)
    return reasons


_UNREACHED = "its chain would not be reached:"
_COPIED = f"{_UNREACHED} a module around it has a __deepcopy__ of its own; use inplace=True"
_HELD = f"{_UNREACHED} the model holds it, too, where it cannot be replaced"
_PASSED_BY = f"{_UNREACHED} the model passes by it, as where layers are found by their type"


class _Used(BaseException):  # which no model takes for an error of its own
    """A model uses the layer itself, or values of a weight that its chain does not have."""

    def __init__(self, layer: nn.Module, reason: str = READ_OUTSIDE) -> None:
        super().__init__()
        self.layer, self.reason = layer, reason


class _Trial:
    """Runs of one model with one set of chains after the other."""

    def __init__(self, model: nn.Module, runs: Sequence[Run], inplace: bool) -> None:
        # A run would give the user's lazy layers their sizes: not in the model itself.
        self._lazy = any(map(is_lazy, model.modules()))
        self._model, self._inplace = model, inplace
        self.runs = [(run, model.training) for run in runs]

    def run(
        self, chains: Mapping[nn.Module, Chain], watched: Collection[nn.Module] = ()
    ) -> set[nn.Module]:
        """The layers whose chain ran, and those of the `watched` modules that did."""
        if self._lazy or (chains and not self._inplace):
            return self._run(copy_with(self._model, chains, share=True), chains, watched)
        with _Placed(self._model, chains):
            return self._run(self._model, chains, watched)

    def _run(
        self,
        model: nn.Module,
        chains: Mapping[nn.Module, Chain],
        watched: Collection[nn.Module],
    ) -> set[nn.Module]:
        reached: set[nn.Module] = set()
        registrations = [
            partial(module.register_forward_pre_hook, lambda *_, layer=layer: reached.add(layer))
            for layer, module in (*chains.items(), *((module, module) for module in watched))
        ]
        registrations += [partial(m.register_forward_pre_hook, _raise_held) for m in chains]
        # A layer that is tied to one of them and is in place reads its own weight.
        there = {id(p) for m in model.modules() for p in m.parameters(recurse=False)}
        absent = {
            layer: (
                *_described(chain),
                *(p for p in layer.parameters(recurse=False) if id(p) not in there),
            )
            for layer, chain in chains.items()
        }
        modes = {module: module.training for module in model.modules()}
        reads = Reads(absent, _raise_read, describe=True)
        kept = KeptParameters(model)
        with evaluating(model), kept, hooks(registrations), no_fast_path(), torch.no_grad(), reads:
            for run, training in self.runs:
                for module, mode in modes.items():
                    module.training = mode and training
                reads.look_at(tensors_of(run(model)))
        return reached

    def first_failing(
        self, chains: Mapping[nn.Module, Chain], error: BaseException
    ) -> tuple[nn.Module, BaseException]:
        """The first layer with whose chain, and those before it, the model fails, and how.

        With all chains it failed with `error`.
        """
        listed = list(chains.items())
        runs, fails = 0, len(listed)
        while fails - runs > 1:
            middle = (runs + fails) // 2
            problem = self._error(dict(listed[:middle]))
            if problem is None:
                runs = middle
            else:
                fails, error = middle, problem
        return listed[fails - 1][0], error

    def _error(self, chains: Mapping[nn.Module, Chain]) -> BaseException | None:
        try:
            self.run(chains)
        except (_Used, Exception) as error:
            return error
        return None

    def drop_what_the_model_fails_at(self) -> None:
        """Keep the runs that the model itself makes, some of them in eval mode only."""
        given = self.runs
        kept: list[tuple[Run, bool]] = []
        for run, training in given:
            for mode in dict.fromkeys((training, False)):
                self.runs = [(run, mode)]
                if self._error({}) is None:
                    kept += self.runs
                    break
        self.runs = kept


class _Placed(Scope):
    """The model itself with the chains in place, inside only."""

    def __init__(self, model: nn.Module, chains: Mapping[nn.Module, Chain]) -> None:
        super().__init__()
        self._model, self._chains = model, chains

    def change(self) -> None:
        layers: Any = {chain: layer for layer, chain in self._chains.items()}
        self.undo.callback(switched_on_again(self._model))
        self.undo.callback(swap, self._model, layers)
        swap(self._model, self._chains)


def _described(chain: nn.Module) -> tuple[Tensor, ...]:
    """The tensors without values by which a chain describes its weight and bias."""
    values = (vars(chain).get(name) for name in ("weight", "bias"))
    return tuple(value for value in values if isinstance(value, Tensor))


def _raise_read(layer: nn.Module) -> None:
    raise _Used(layer)


def _raise_held(layer: nn.Module, _: Any) -> None:
    raise _Used(layer, _HELD)
