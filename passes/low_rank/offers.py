"""What each layer may become, what that costs, counted, timed or predicted, and one choice for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from slim.contract import Meter
from slim.goal import Goal
from slim.passes.low_rank import schemes, select
from slim.passes.low_rank.select import Option
from slim.passes.low_rank.ways import Way

if TYPE_CHECKING:
    from slim.passes.elastic.latency import Rates

Select = Literal["uniform", "energy", "greedy", "knapsack", "gated"]
Ladder = Sequence[Way]
"""Every way to write one layer."""

TIMED_RANKS = 8
"""Ranks of one way that are timed: a layer's time is close to a line in its rank, with steps of the kernels' tiles."""


@dataclass(frozen=True)
class Pick:
    """What a layer becomes."""

    way: Way
    rank: int
    dense_ms: float | None = None
    """Measured time of the layer alone as it was; none where nothing was timed."""
    ms: float | None = None
    """Measured time of both factors."""

    @property
    def name(self) -> str:
        """Of the layer."""
        return self.way.candidate.name


@dataclass(frozen=True)
class Offers:
    """The choices of every layer, the first of which is to stay dense."""

    rule: Select
    picks: list[list[Pick | None]]
    """What each choice is, none for dense."""
    options: list[tuple[Option, ...]]
    """What each costs, in the unit of the goal, and loses."""

    @property
    def dense(self) -> float:
        """Cost of all layers as they are."""
        return sum(choices[0].cost for choices in self.options)

    @property
    def cheapest(self) -> list[int]:
        """The choice of least cost of every layer."""
        return [min(range(len(choices)), key=lambda i: choices[i].cost) for choices in self.options]

    def within(self, budget: float) -> list[int]:
        """One choice for every layer, together within `budget`. Raises select.Unreachable."""
        match self.rule:
            case "uniform":
                dense = [next(pick for pick in picks if pick is not None).way.dense_params for picks in self.picks]
                shares = [
                    [1.0 if pick is None else pick.way.params(pick.rank) / whole for pick in picks]
                    for picks, whole in zip(self.picks, dense, strict=True)
                ]
                return select.uniform(self.options, shares, budget)
            case "energy":
                return select.energy(self.options, budget)
            case "knapsack":
                return select.knapsack(self.options, budget)
            case "greedy" | "gated":  # gates have replaced the spectra
                return select.greedy(self.options, budget)

    def chosen(self, choices: Sequence[int]) -> list[Pick | None]:
        """What the layers become."""
        return [picks[index] for picks, index in zip(self.picks, choices, strict=True)]

    def cost(self, choices: Sequence[int]) -> float:
        """Of all layers."""
        return select.cost_of(self.options, choices)

    def step_below(self, choices: Sequence[int]) -> float:
        """What the smallest step down would save; 0 where there is none."""
        return select.step_below(self.options, choices)


def offers(
    goal: Goal,
    ladders: Sequence[Ladder],
    *,
    rule: Select,
    align: int,
    guard: float,
    meter: Meter | None = None,
    rates: Rates | None = None,
) -> Offers:
    """The choices of every layer.

    Args:
        goal: what is counted or timed.
        ladders: of every layer.
        rule: that will choose.
        align: ranks are multiples of this.
        guard: most of the break-even rank.
        meter: times layers where the goal is in milliseconds, and is not asked otherwise.
        rates: a table, by which milliseconds are predicted; none: they are timed.
    """
    timed = goal.timed and rates is None
    picks = [[None, *_picks(ladder, align, guard, TIMED_RANKS if timed else None)] for ladder in ladders]
    if timed:
        assert meter is not None  # the caller's: a goal in milliseconds needs a target
        picks, dense = _timed(ladders, picks, meter)
    else:
        dense = [_dense_cost(goal, ladder[0]) if rates is None else predicted(rates, ladder[0]) for ladder in ladders]

    def cost(pick: Pick) -> float:
        return _cost(goal, pick) if rates is None else predicted(rates, pick.way, pick.rank)

    options = [
        (
            Option(rank=0, cost=whole, loss=0.0),
            *(Option(p.rank, cost(p), _loss(rule, p), p.way.scheme) for p in found if p),
        )
        for whole, found in zip(dense, picks, strict=True)
    ]
    return Offers(rule, picks, options)


def predicted(rates: Rates, way: Way, rank: int = 0) -> float:
    """Milliseconds of a layer as two, or as one at rank 0; of one that the table lacks, those of its operations."""
    dense = way.dense_cost("macs")
    macs = way.cost("macs", rank) if rank else dense
    ms = rates.mac * macs
    if (alone := rates.ranks.get(way.candidate.name)) is not None:
        ms += alone * macs / dense + (rates.pair if rank else 0.0)
    return ms


def _picks(ladder: Ladder, align: int, guard: float, most: int | None) -> list[Pick]:
    found = []
    for way in ladder:
        ranks = way.ranks(align, guard)
        if most is not None and len(ranks) > most:
            ranks = tuple(ranks[round(i * (len(ranks) - 1) / (most - 1))] for i in range(most))
        found += [Pick(way, rank) for rank in ranks]
    return found


def _loss(rule: Select, pick: Pick) -> float:
    return float(pick.way.losses[pick.rank]) if rule == "energy" else pick.way.penalty(pick.rank)


def _dense_cost(goal: Goal, way: Way) -> float:
    return way.dense_cost("macs") if goal.metric == "macs" else _unit(goal) * way.dense_cost("params")


def _cost(goal: Goal, pick: Pick) -> float:
    if goal.timed:
        assert pick.ms is not None  # _timed set it
        return pick.ms * pick.way.candidate.calls
    if goal.metric == "macs":
        return pick.way.cost("macs", pick.rank)
    return _unit(goal) * pick.way.cost("params", pick.rank)


def _unit(goal: Goal) -> int:
    """Of the goal in one parameter: bytes of the file, or the parameter itself."""
    return 4 if goal.metric == "size" else 1


def _timed(
    ladders: Sequence[Ladder], picks: Sequence[Sequence[Pick | None]], meter: Meter
) -> tuple[list[list[Pick | None]], list[float]]:
    """The picks with their milliseconds, and the milliseconds of every dense layer, all its calls."""
    entries: list[tuple[nn.Module, tuple[int, ...]]] = []
    for ladder, found in zip(ladders, picks, strict=True):
        candidate = ladder[0].candidate
        entries.append((candidate.layer, candidate.size))
        for pick in found:
            if pick is not None:
                entries.append((schemes.factored(candidate.layer, pick.way.scheme, pick.rank), candidate.size))
    milliseconds = iter(meter.table(entries))
    timed: list[list[Pick | None]] = []
    dense: list[float] = []
    for ladder, found in zip(ladders, picks, strict=True):
        whole = next(milliseconds).value
        dense.append(whole * ladder[0].candidate.calls)
        timed.append(
            [pick and Pick(pick.way, pick.rank, dense_ms=whole, ms=next(milliseconds).value) for pick in found]
        )
    return timed, dense
