"""Plans under a budget against every plan there is: of small models, over what they are offered."""

import math

import numpy as np
import torch
from torch import nn

import tdecomp
from tdecomp import Budget
from tests.models import torch_macs

METHODS = ("svd", "lowrank", ["svd", "lowrank"], ["lowrank", "spatial"], "dense", "auto")
KERNELS = (1, 3, (3, 1), (1, 3), 5)
# How much more than the least a plan may lose, as shares of the least and of all there is to lose.
WITHIN, ENERGY = 0.01, 1e-6


def problems(seed, budgets=5):
    """What is wrong with each of some plans for a small model drawn by the seed, None if nothing.

    They meet their budgets and lose within 1% of the least of all plans there are, a plan is
    refused only where none of these meets the budget, and lower bounds are bounds.
    """
    rng = np.random.default_rng(seed)
    model, inputs = _model(rng)
    methods, given = METHODS[rng.integers(len(METHODS))], {"progress": False}
    if rng.random() < 0.8:
        given["example_inputs"] = inputs
    if rng.random() < 0.5:
        batches = [torch.cat([inputs, torch.rand_like(inputs)])] * 2
        given["data"] = tdecomp.calibrate(model, batches, progress=False)
    table = tdecomp.sensitivity(model, methods, **given)
    whole = {"params": sum(p.numel() for p in model.parameters())}
    if "example_inputs" in given:
        whole["macs"] = torch_macs(model, inputs)
    costs, losses = _every_way(table, whole)
    found = []
    for budget in _budgets(rng, costs, whole, budgets):
        least = _least(budget, costs, losses, whole)
        try:
            plan = tdecomp.plan(model, methods, rank=budget, **given)
        except ValueError as error:
            refused = "cannot be met" in str(error) and math.isinf(least)
            problem = None if refused else f"can be met, but {error}"
        else:
            problem = _problem(plan, least, losses.max(), table, budget)
        found.append(problem and f"seed {seed}, {methods}, {budget}: {problem}")
    return found


def _model(rng):
    """Two or three small layers, and inputs for them."""
    torch.manual_seed(int(rng.integers(2**31)))
    channels, size, count = (int(rng.integers(*ends)) for ends in ((2, 7), (4, 9), (2, 4)))
    convolutions = int(rng.integers(0, count + 1))
    inputs = torch.randn((2, 2 * channels, size, size) if convolutions else (4, 4 * channels))
    x, layers = inputs, []
    for i in range(count):
        bias = bool(rng.random() < 0.7)
        if i < convolutions:
            layer = nn.Conv2d(
                x.shape[1], 2 * int(rng.integers(2, 9)), KERNELS[rng.integers(len(KERNELS))],
                stride=int(rng.integers(1, 3)), padding=2, groups=int(rng.choice([1, 1, 1, 2])),
                bias=bias,
            )  # fmt: skip
        else:
            if x.ndim > 2:
                layers.append(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()))
            features = layers[-1](x).shape[1] if layers else x.shape[1]
            layer = nn.Linear(features, int(rng.integers(4, 30)), bias=bias)
        _set_weight(layer, rng)
        layers += [layer, nn.ReLU()]
        x = nn.Sequential(*layers)(inputs)
    return nn.Sequential(*layers).eval(), inputs


def _set_weight(layer, rng):
    """A falling spectrum, a planted low rank up to the whole one, or a Gaussian weight."""
    kind, weight = rng.integers(4), layer.weight
    with torch.no_grad():
        weight.normal_().mul_(10 ** rng.uniform(-4, 1))
        left, values, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        places = torch.arange(len(values))
        if kind == 0:
            values = torch.exp(-places * rng.uniform(0.05, 1))
        elif kind == 1:
            values = (1 + places) ** -rng.uniform(0.3, 2)
        elif kind == 2:
            values[int(rng.integers(1, len(values) + 1)) :] = 0
        weight.copy_((left * values @ right).reshape(weight.shape))


def _every_way(table, whole):
    """What the model costs, and the losses, with every combination of what `sensitivity` prints."""
    costs, losses = np.array([list(whole.values())]), np.zeros(1)
    for layer in filter(None, table.values()):
        points = [point for curve in layer.values() for point in curve.points]
        before = [getattr(layer.before, unit) for unit in whole]
        extra = [[getattr(p.cost, unit) for unit in whole] for p in points] + [before]
        costs = (costs[:, None] + np.array(extra) - before).reshape(-1, len(whole))
        losses = np.add.outer(losses, [p.loss for p in points] + [0.0]).ravel()
    return costs, losses


def _budgets(rng, costs, whole, count):
    """Shares up to the whole, a third of them at the very edge of what can be reached."""
    units = list(whole)
    for _ in range(count):
        named = rng.permutation(len(units))[: rng.integers(1, len(units) + 1)]
        way, edge = costs[rng.integers(len(costs))], costs.min(axis=0)
        near = edge if rng.random() < 0.5 else way
        shares = {}
        for i in named:
            share = rng.uniform(0.5 * edge[i], whole[units[i]])
            if rng.random() < 0.3:
                share = near[i] + rng.choice([-0.5, 0.5])
            shares[units[i]] = float(np.clip(share / whole[units[i]], 1e-3, 1))
        yield Budget(**shares)


def _least(budget, costs, losses, whole):
    """The least loss of the ways that meet the budget; infinite where none does."""
    limits = [(getattr(budget, unit) or 1.0) * amount for unit, amount in whole.items()]
    return losses[np.all(costs <= limits, axis=1)].min(initial=math.inf)


def _problem(plan, least, energy, table, budget):
    """What is wrong with a plan, in words; None where nothing is."""
    for unit in ("macs", "params"):
        share, after = getattr(budget, unit), getattr(plan.after, unit)
        if share is not None and after > share * getattr(plan.before, unit):
            return f"not met: {after} {unit}"
    lost, slack = sum(_loss(table[row.name], row) for row in plan), ENERGY * energy
    if lost > (1 + WITHIN) * least + slack:
        return f"loses {lost:.6g}, the least is {least:.6g} of {energy:.3g}"
    if not plan.loss.bound <= min(least, plan.loss.chosen) + 1e-6 * slack:
        return f"{plan.loss}, the least is {least:.6g} of {energy:.3g}"
    return None


def _loss(layer, row):
    """That of the row's chain: the table's, at the largest rank that is not above the row's."""
    if row.method is None:
        return 0.0
    within = (p.loss for p in layer[row.method].points if np.all(np.less_equal(p.rank, row.rank)))
    return min(within, default=math.inf)
