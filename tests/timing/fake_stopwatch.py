"""A machine whose times are known: seconds by a law, no measurement."""

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tdecomp.layers.chain import Chain
from tdecomp.layers.cost import chain_cost
from tdecomp.timing.stopwatch import Stopwatch

PER_MAC = 1e-9
PER_LAYER = 2e-6


class FakeStopwatch(Stopwatch):
    """Every MAC takes a nanosecond and every layer two microseconds more.

    Attributes
    ----------
    in_model : float
        How much longer a chain takes inside a model than alone.
    scatter, chain_scatter : float
        How much times scatter: of whole models, and of chains timed against their layer.
    slow_layouts : dict
        Layouts in which everything takes longer, and how much.
    rest : float
        Seconds that a model takes besides its layers.
    law : callable ``(stages, call) -> float``
        Seconds of a layer or a chain.
    """

    def __init__(self):
        self.in_model = 1.0
        self.scatter = 0.0
        self.chain_scatter = 0.0
        self.slow_layouts = {}
        self.rest = 0.0
        self.per_layer = PER_LAYER
        self.law = self.in_proportion
        self.layers_timed = []

    def layers(self, chains, call, layout, device, dtype, effort):
        del device, dtype
        self.layers_timed += [(layout, stages, call) for stages in chains]
        one = [self.chain(stages, call, layout) for stages in chains]
        table = np.tile(one, (effort.rounds, 1))
        table[:, 1:] *= 1 + self.chain_scatter * np.linspace(-2, 2, effort.rounds)[:, None]
        return table

    def chain(self, stages, call, layout="contiguous"):
        return self.law(stages, call) * self.slow_layouts.get(layout, 1.0)

    def in_proportion(self, stages, call):
        return chain_cost(stages, (call,)).macs * PER_MAC + len(stages) * self.per_layer

    def models(self, runs, example, *, compiled=False, rounds=9):
        del compiled
        columns = [self.whole(model, example, layout) for model, layout in runs]
        table = np.tile(columns, (rounds, 1))
        noisy = slice(1 if len(columns) > 1 else 0, None)
        table[:, noisy] *= 1 + self.scatter * np.linspace(-1, 1, rounds)[:, None]
        return table

    def whole(self, model, example, layout="contiguous"):
        seconds = 0.0
        chains = [m for m in model.modules() if isinstance(m, Chain)]
        inside = {id(stage) for chain in chains for stage in chain}
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                factor = self.in_model if id(module) in inside else 1.0
                seconds += factor * (_macs(model, module, example) * PER_MAC + self.per_layer)
        return (seconds + self.rest) * self.slow_layouts.get(layout, 1.0)


def _macs(model, layer, example):
    found = []

    def count(module, args, _):
        with FlopCounterMode(display=False) as counter:
            type(module).forward(module, *args)
        found.append(counter.get_total_flops() // 2)

    handle = layer.register_forward_hook(count)
    with torch.no_grad():
        example.run(model)
    handle.remove()
    return sum(found)
