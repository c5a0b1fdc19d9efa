"""Choosing one option for every layer under one budget: plain functions of numbers.

Each rule returns, for every layer, the index of the option it takes. The sum of their costs meets the budget; where
that cannot be, `Unreachable` is raised. Costs may be counted or measured: a measured cost need not rise with the rank,
so an option that another one beats in both cost and loss is never taken.

Sources: one share for all is PELA (Guo et al. 2024, arXiv:2310.10700); greedy by loss removed per cost is water
filling; the multiple-choice knapsack over measured latencies is that of HALP (Shen et al. 2021, arXiv:2110.10811).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slim.passes.reach import Unreachable

BINS = 100_000
"""Bins of cost in `knapsack`; 60 layers of 16 options then take a tenth of a second and 12 MB."""

ROUNDING = 1e-12
"""Share of a budget that a sum of floats may lie above it: a budget equal to a cost is met by that cost."""


@dataclass(frozen=True)
class Option:
    """One way to build a layer."""

    rank: int
    """0 is the layer as it is."""
    cost: float
    """Params, MACs, bytes or ms."""
    loss: float
    """What is lost with it, 0 or more; 0 for the layer as it is. Losses of different layers are added."""
    scheme: str = ""


Options = tuple[Option, ...]
"""Those of one layer; the layer as it is, of rank 0, is always among them."""


def front(options: Options) -> Options:
    """Options that no other beats in both cost and loss: cost ascends, loss strictly descends."""
    return tuple(options[index] for index in _front(options))


def greedy(layers: Sequence[Options], budget: float) -> list[int]:
    """From the cheapest option of every layer, always the upgrade that removes most loss per cost and still fits.

    Until the first that does not fit this walks the lower convex hulls, so its loss is above that of the linear
    relaxation by less than what that one upgrade would have removed.
    """
    fronts, chosen = _start(layers, budget)
    while True:
        left = budget * (1 + ROUNDING) - cost_of(layers, chosen)
        upgrades = []
        for number, (layer, kept) in enumerate(zip(layers, fronts, strict=True)):
            now = layer[chosen[number]]
            for index in kept:
                dearer, removed = layer[index].cost - now.cost, now.loss - layer[index].loss
                if removed > 0 and dearer <= left:
                    upgrades.append((removed / dearer, number, index))
        if not upgrades:
            return chosen
        _, number, index = max(upgrades)
        chosen[number] = index


def knapsack(layers: Sequence[Options], budget: float, bins: int = BINS) -> list[int]:
    """The least sum of losses, by dynamic programming over bins of cost.

    A bin is the span from all cheapest to all dearest, over `bins`. Costs are rounded up to whole bins, so the budget
    is never exceeded, and the loss is at most the optimum for a budget smaller by one bin per layer. Whole-number
    costs are exact as long as the span is at most `bins` of their common divisor. A larger budget never loses more.
    """
    fronts, chosen = _start(layers, budget)
    lossless = [kept[-1] for kept in fronts]
    if _meets(cost_of(layers, lossless), budget):
        return lossless
    cheapest = cost_of(layers, chosen)
    extras = [
        np.array([layer[index].cost - layer[kept[0]].cost for index in kept])
        for layer, kept in zip(layers, fronts, strict=True)
    ]
    unit = _bin(np.concatenate(extras), cost_of(layers, lossless) - cheapest, bins)
    room = math.floor((budget * (1 + ROUNDING) - cheapest) / unit)
    weights = [np.ceil(extra / unit).astype(np.int64) for extra in extras]
    best = np.zeros(room + 1)
    """Least loss of the layers so far within so many bins."""
    taken = np.zeros((len(layers), room + 1), dtype=np.int16)
    for number, (layer, kept) in enumerate(zip(layers, fronts, strict=True)):
        before, best = best, np.full(room + 1, np.inf)
        for position, (index, weight) in enumerate(zip(kept, weights[number].tolist(), strict=True)):
            if weight > room:
                continue
            loss = before[: room + 1 - weight] + layer[index].loss
            better = loss < best[weight:]
            best[weight:][better] = loss[better]
            taken[number, weight:][better] = position
    for number in reversed(range(len(layers))):
        position = int(taken[number, room])
        chosen[number] = fronts[number][position]
        room -= int(weights[number][position])
    return chosen


def uniform(layers: Sequence[Options], shares: Sequence[Sequence[float]], budget: float) -> list[int]:
    """One share c for all: in every layer the option with the largest share up to c; the largest c within the budget.

    shares: like `layers`, the option's parameters over the layer's own, 1 for the layer as it is. Options with more
    parameters than the layer are not considered. A layer that has nothing as small as c gets its smallest; an option
    that another beats in cost and loss gives way to that one.

    Raises:
        Unreachable: no share meets the budget; `smallest` is the least cost that one share for all reaches.
    """
    smallest = math.inf
    for share in sorted({1.0, *(share for row in shares for share in row if share <= 1)}, reverse=True):
        chosen = [_at_share(layer, row, share) for layer, row in zip(layers, shares, strict=True)]
        if _meets(cost := cost_of(layers, chosen), budget):
            return chosen
        smallest = min(smallest, cost)
    raise Unreachable(smallest)


def energy(layers: Sequence[Options], budget: float) -> list[int]:
    """One loss tau for all: in every layer the cheapest option that loses at most tau; the least tau within the budget.

    Meant for losses relative to the layer's energy.
    """
    fronts, chosen = _start(layers, budget)
    for tau in sorted({layer[index].loss for layer, kept in zip(layers, fronts, strict=True) for index in kept}):
        chosen = [
            next(index for index in kept if layer[index].loss <= tau)
            for layer, kept in zip(layers, fronts, strict=True)
        ]
        if _meets(cost_of(layers, chosen), budget):
            break
    return chosen


def cost_of(layers: Sequence[Options], chosen: Sequence[int]) -> float:
    """Sum of the costs of the chosen options."""
    return math.fsum(layer[index].cost for layer, index in zip(layers, chosen, strict=True))


def step_below(layers: Sequence[Options], chosen: Sequence[int]) -> float:
    """Cost saved by the smallest step down that one layer alone can take; 0 where no layer has anything cheaper."""
    steps = [
        layer[index].cost - option.cost
        for layer, index in zip(layers, chosen, strict=True)
        for option in front(layer)
        if option.cost < layer[index].cost
    ]
    return min(steps, default=0.0)


def _front(options: Options) -> list[int]:
    kept: list[int] = []
    # Of equals the layer as it is, else the first.
    for index in sorted(range(len(options)), key=lambda i: (options[i].cost, options[i].loss, options[i].rank != 0)):
        if not kept or options[index].loss < options[kept[-1]].loss:
            kept.append(index)
    return kept


def _start(layers: Sequence[Options], budget: float) -> tuple[list[list[int]], list[int]]:
    """Every layer's front, and the cheapest choice. Raises Unreachable."""
    fronts = [_front(layer) for layer in layers]
    cheapest = [kept[0] for kept in fronts]
    if not _meets(cost := cost_of(layers, cheapest), budget):
        raise Unreachable(cost)
    return fronts, cheapest


def _meets(cost: float, budget: float) -> bool:
    return cost <= budget * (1 + ROUNDING)


def _bin(extras: NDArray[np.float64], span: float, bins: int) -> float:
    """Width of a bin: the common divisor of whole-number costs, or as many of them as it takes; else span / bins."""
    if not np.all(extras == np.round(extras)):
        return span / bins
    divisor = math.gcd(*map(int, extras))
    return divisor * math.ceil(span / (divisor * bins))


def _at_share(layer: Options, shares: Sequence[float], share: float) -> int:
    fitting = [index for index, one in enumerate(shares) if one <= share]
    aim = max(shares[index] for index in fitting) if fitting else min(shares)
    picked = min((i for i, one in enumerate(shares) if one == aim), key=lambda i: (layer[i].loss, layer[i].cost))
    rivals = [i for i in _front(layer) if layer[i].cost <= layer[picked].cost and layer[i].loss <= layer[picked].loss]
    return rivals[-1]  # a front holds for every option one that is no worse; the last loses least
