"""A machine whose times are known: seconds by a law, no measurement."""

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tdecomp.layers.chain import Chain
from tdecomp.layers.cost import chain_cost
from tdecomp.model.trace import as_call
from tdecomp.timing import measure as measuring
from tdecomp.timing import pairs
from tdecomp.timing import whole_model as whole
from tdecomp.timing.setting import in_layout

PER_MAC = 1e-9
PER_LAYER = 2e-6


class FakeClock:
    """Every MAC takes a nanosecond and every layer two microseconds more.

    Attributes
    ----------
    in_model : float
        How much longer a chain takes inside a model than alone.
    scatter : float
        From quartile to quartile, of whole models.
    slow_layouts : dict
        Layouts in which all takes longer, and how much.
    rest : float
        Seconds that a model takes beside its layers.
    """

    def __init__(self):
        self.in_model = 1.0
        self.scatter = 0.0
        self.pair_scatter = 0.0
        self.slow_layouts = {}
        self.rest = 0.0
        self.per_layer = PER_LAYER
        self.layers_timed = []
        self.models_timed = 0

    def seconds_of(self, chains, call, layout, device, dtype, *, rounds, min_block):
        del device, dtype, min_block
        self.layers_timed += [(layout, stages, call) for stages in chains]
        one = [self.chain(stages, call, layout) for stages in chains]
        table = np.tile(one, (rounds, 1))
        table[:, 1:] *= 1 + self.pair_scatter * np.linspace(-2, 2, rounds)[:, None]
        return table

    def chain(self, stages, call, layout="contiguous"):
        seconds = chain_cost(stages, (call,)).macs * PER_MAC + len(stages) * self.per_layer
        return seconds * self.slow_layouts.get(layout, 1.0)

    def timed(self, runs, example_inputs, compiled, rounds):
        del compiled
        columns = [self.whole(model, example_inputs, layout) for model, layout in runs]
        self.models_timed += len(runs)
        noise = 1 + self.scatter * np.linspace(-1, 1, rounds)[:, None]
        table = np.tile(columns, (rounds, 1))
        table[:, 1:] *= noise
        if len(columns) == 1:
            table *= noise
        return table

    def whole(self, model, example_inputs, layout):
        seconds = 0.0
        chains = [m for m in model.modules() if isinstance(m, Chain)]
        inside = {id(stage) for chain in chains for stage in chain}
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                factor = self.in_model if id(module) in inside else 1.0
                seconds += factor * (_macs(model, module, example_inputs) * PER_MAC)
                seconds += factor * self.per_layer
        return (seconds + self.rest) * self.slow_layouts.get(layout, 1.0)


def _macs(model, layer, example_inputs):
    found = []

    def count(module, args, _):
        with FlopCounterMode(display=False) as counter:
            type(module).forward(module, *args)
        found.append(counter.get_total_flops() // 2)

    handle = layer.register_forward_hook(count)
    args, kwargs = as_call(in_layout(example_inputs, "contiguous"))
    with torch.no_grad():
        model(*args, **kwargs)
    handle.remove()
    return sum(found)


def install(monkeypatch):
    """Put the known machine in the place of this one."""
    clock = FakeClock()
    monkeypatch.setattr(measuring, "seconds_of", clock.seconds_of)
    monkeypatch.setattr(pairs, "seconds_of", clock.seconds_of)
    monkeypatch.setattr(whole, "_timed", clock.timed)
    return clock
