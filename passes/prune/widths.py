"""How wide each group shall be under one budget: plain functions of scores and prices.

`local` is one share for all (Li et al. 2017, arXiv:1608.08710); `isomorphic` one share for every class of groups of the
same build, ranked together within it (Fang et al. 2024, arXiv:2407.04616); `global` cuts where the least is lost for
what is saved, step by step, prices taken at the widths reached so far (as HALP does for latency, arXiv:2110.10811); the
others follow densities found before training (PreCrop, arXiv:2203.02549).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

from slim.passes.prune.criteria import Ranked, share_lost
from slim.passes.prune.groups import Group
from slim.passes.prune.prices import Part, Prices
from slim.passes.reach import Unreachable

Ranking = Literal["global", "local", "isomorphic", "synflow", "erk", "magnitude", "proxy"]
Units = tuple[int, ...]
"""Units that each group keeps."""
Share = Callable[[float], Units]
"""What each group keeps for a figure from 0 (the fewest) to 1 (all)."""


def allowed(group: Group, align: int, floor: int) -> tuple[int, ...]:
    """Units that a group may keep, ascending: widths that are multiples of `align` from `floor` up, and all.

    In attention heads are counted, or the width of one head; at least one head stays.
    """
    unit = 1 if group.kind == "dims" else group.unit
    if group.kind == "heads":
        align, floor = 1, 1
    found = [units for units in range(1, group.units) if units * unit % align == 0 and units * unit >= floor]
    return (*found, group.units)


def nearest(options: Sequence[int], wanted: float) -> int:
    """The option closest to `wanted`; of two the larger."""
    return min(options, key=lambda one: (abs(one - wanted), -one))


@dataclass(frozen=True)
class Widths:
    """All groups, what they lose at every width, and what the network then costs."""

    ranked: Sequence[Ranked]
    options: Sequence[tuple[int, ...]]
    """Units that each may keep, ascending."""
    prices: Prices
    by_share: Share | None = None
    """Widths for one figure; none chooses step by step."""
    losses: list[list[float]] = field(init=False)

    def __post_init__(self) -> None:
        # The square: by the share itself a budget would be met by emptying two or three groups.
        losses = [(share_lost(one.scores) ** 2).tolist() for one in self.ranked]
        object.__setattr__(self, "losses", losses)

    @cached_property
    def whole(self) -> Units:
        """All units of every group."""
        return tuple(one.group.units for one in self.ranked)

    @cached_property
    def dense(self) -> float:
        """Cost of the network as it is."""
        return self.cost(self.whole)

    @cached_property
    def cheapest(self) -> Units:
        """The fewest units of every group."""
        return tuple(options[0] for options in self.options)

    def cost(self, choice: Units) -> float:
        """Of the network with these units."""
        return self.prices.cost(self._gone(choice))

    def step_below(self, choice: Units) -> float:
        """What the smallest step down of one group would save; 0 where there is none."""
        now = self.cost(choice)
        saved = []
        for number, options in enumerate(self.options):
            place = options.index(choice[number])
            if place:
                saved.append(now - self.cost((*choice[:number], options[place - 1], *choice[number + 1 :])))
        return min((one for one in saved if one > 0), default=0.0)

    def within(self, budget: float) -> Units:
        """The widths for a cost of at most `budget`. Raises Unreachable."""
        if self.cost(self.cheapest) > budget:
            raise Unreachable(self.cost(self.cheapest))
        return self._stepwise(budget) if self.by_share is None else self._shared(budget, self.by_share)

    def _shared(self, budget: float, by_share: Share) -> Units:
        """The largest figure within the budget, then what the next larger one would add, group by group."""
        low, high = 0.0, 1.0
        if self.cost(by_share(high)) <= budget:
            return by_share(high)
        while high - low > 1e-5:  # finer than one channel of a group of any width
            middle = (low + high) / 2
            low, high = (middle, high) if self.cost(by_share(middle)) <= budget else (low, middle)
        chosen, larger = list(by_share(low)), by_share(high)
        for number, units in enumerate(larger):
            now, chosen[number] = chosen[number], units
            if self.cost(tuple(chosen)) > budget:
                chosen[number] = now
        return tuple(chosen)

    def _stepwise(self, budget: float) -> Units:
        """From all units, always the step that loses least for what it saves; then what the last one left is spent."""
        places, gone = [len(options) - 1 for options in self.options], [0] * len(self.options)
        steps = [self._step(number, places[number], gone) for number in range(len(gone))]
        cost = self.dense
        while cost > budget:
            number = min(range(len(steps)), key=lambda n: steps[n][0])
            if math.isinf(steps[number][0]):  # by a noisy table no group saves any more, yet several together do
                number = min(
                    (n for n, place in enumerate(places) if place), key=lambda n: self._next_loss(n, places[n])
                )
                steps[number] = math.inf, places[number] - 1
            places[number] = steps[number][1]
            gone[number] = self.whole[number] - self.options[number][places[number]]
            cost = self.prices.cost(gone)
            for other in self._neighbours[number]:
                steps[other] = self._step(other, places[other], gone)
        return self._filled(places, budget)

    def _filled(self, places: list[int], budget: float) -> Units:
        """Wider by single steps that still fit, first what regains most for what it costs, until none does."""
        gone = self._gone(self._units(places))
        while True:
            left, best, chosen = budget - self.prices.cost(gone), -math.inf, None
            for number, (options, place) in enumerate(zip(self.options, places, strict=True)):
                if place + 1 == len(options):
                    continue
                there = list(gone)
                there[number] = self.whole[number] - options[place + 1]
                cost = sum(part.cost(there) - part.cost(gone) for part in self._parts[number])
                regained = self.losses[number][options[place]] - self.losses[number][options[place + 1]]
                worth = regained / cost if cost > 0 else math.inf
                if cost <= left and worth > best:
                    best, chosen = worth, number
            if chosen is None:
                return self._units(places)
            places[chosen] += 1
            gone[chosen] = self.whole[chosen] - self.options[chosen][places[chosen]]

    def _step(self, number: int, place: int, gone: Sequence[int]) -> tuple[float, int]:
        """Loss per cost of the best step down of a group, infinite where none saves, and the place it leads to.

        A step may be wide: a kernel's time falls in steps wider than one of ours.
        """
        best = math.inf, place
        parts, losses, options = self._parts[number], self.losses[number], self.options[number]
        now = sum(part.cost(gone) for part in parts)
        for lower in range(place):
            there = list(gone)
            there[number] = self.whole[number] - options[lower]
            saved = now - sum(part.cost(there) for part in parts)
            if saved > 0:
                best = min(best, ((losses[options[lower]] - losses[options[place]]) / saved, lower))
        return best

    def _next_loss(self, number: int, place: int) -> float:
        """What one step down adds."""
        losses, options = self.losses[number], self.options[number]
        return losses[options[place - 1]] - losses[options[place]]

    @cached_property
    def _parts(self) -> list[tuple[Part, ...]]:
        return [self.prices.of(number) for number in range(len(self.ranked))]

    @cached_property
    def _neighbours(self) -> list[set[int]]:
        """Groups whose steps save another amount once the width of one has changed."""
        return [{n for part in parts for side in part.sides for n in side.per_unit} for parts in self._parts]

    def _units(self, places: Sequence[int]) -> Units:
        return tuple(options[place] for options, place in zip(self.options, places, strict=True))

    def _gone(self, choice: Units) -> list[int]:
        return [whole - units for whole, units in zip(self.whole, choice, strict=True)]


def local(ranked: Sequence[Ranked], options: Sequence[tuple[int, ...]]) -> Share:
    """One share of the units of every group."""
    return lambda share: tuple(
        nearest(some, share * one.group.units) for one, some in zip(ranked, options, strict=True)
    )


def isomorphic(ranked: Sequence[Ranked], options: Sequence[tuple[int, ...]], classes: Sequence[str]) -> Share:
    """One share of the units of every class; within a class those of the highest scores stay, wherever they are."""
    pools: dict[str, list[tuple[float, float, int]]] = {name: [] for name in classes}
    for number, (one, name) in enumerate(zip(ranked, classes, strict=True)):
        # Over their mean, for one group may have larger values throughout; of equals each group keeps as many.
        normal = one.scores / one.scores.mean().clamp(min=torch.finfo(torch.double).tiny)
        units = len(normal)
        pools[name] += [(-x, at / units, number) for at, x in enumerate(normal.sort(descending=True).values.tolist())]
    pooled = [[number for *_, number in sorted(pool)] for pool in pools.values()]

    def kept(share: float) -> Units:
        found = Counter(number for pool in pooled for number in pool[: round(share * len(pool))])
        return tuple(nearest(some, found[number]) for number, some in enumerate(options))

    return kept


def by_density(ranked: Sequence[Ranked], options: Sequence[tuple[int, ...]], log_shares: Sequence[float]) -> Share:
    """Shares of the units in the proportions exp(log_shares): all are moved together, and none is above 1."""
    # From where every group is at its fewest to where every one is whole.
    fewest = [math.log(some[0] / one.group.units) for one, some in zip(ranked, options, strict=True)]
    low = min(least - x for least, x in zip(fewest, log_shares, strict=True))
    high = -min(log_shares)

    def kept(share: float) -> Units:
        shift = low + share * (high - low)
        return tuple(
            nearest(some, min(1.0, math.exp(x + shift)) * one.group.units)
            for one, some, x in zip(ranked, options, log_shares, strict=True)
        )

    return kept
