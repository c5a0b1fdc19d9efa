"""Ranks that reach what `--to` asks for: predicted layer by layer, then measured as a whole network.

What is counted (parameters, multiply-accumulates) adds up exactly. Milliseconds do not quite: the table holds each
layer alone, so the whole is built, exported and timed, and the predicted budget is moved until the measurement fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue
from torch import nn

from slim import costs
from slim.contract import Context, Meter
from slim.errors import PassError
from slim.goal import Goal
from slim.passes.low_rank import schemes, select
from slim.passes.low_rank.select import Option
from slim.passes.low_rank.ways import Way

Select = Literal["uniform", "energy", "greedy", "knapsack", "gated"]
Ladder = Sequence[Way]
"""Every way to write one layer."""

TIMED_RANKS = 8
"""Ranks of one way that are timed: a layer's time is close to a line in its rank, with steps of the kernels' tiles."""
MEASURED = ("latency", "size")
"""What does not add up exactly, and is measured on the exported file."""
ATTEMPTS = 5
"""Networks built and measured to meet a budget that is measured."""
TOLERANCE = 1.02
"""A budget is missed when the measured interval lies above this multiple of it."""
CLOSE = 0.97
"""A measured network that uses this share of its budget, or more, is not enlarged again."""


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
class Reached:
    """The picks of every layer, none where it stays dense, and the figures of the whole."""

    picks: list[Pick | None]
    figures: dict[str, JsonValue]


def reach(
    goal: Goal,
    ladders: Sequence[Ladder],
    model: nn.Module,
    build: Callable[[list[Pick | None]], nn.Module],
    context: Context,
    *,
    rule: Select,
    align: int,
    guard: float,
) -> Reached:
    """Ranks under the budget `goal`.

    Args:
        goal: what is to be reached, as a share of what `model` costs or absolutely.
        ladders: the ways of every layer that may be factored.
        model: the network as it is.
        build: the network with the given picks, values unset.
        context: its meter times and exports.
        rule: how ranks are chosen; see slim/passes/low_rank/select.py.
        align: ranks are multiples of it.
        guard: largest share of the break-even rank.

    Raises:
        PassError: the budget cannot be reached, or was missed although a smaller network exists.
    """
    layers, picks = _options(goal, ladders, context, rule, align, guard)
    before = cost_of(goal, model, context)
    limit = goal.limit_of(before)
    fixed = before - sum(options[0].cost for options in layers)
    budget = limit - fixed
    attempts: list[_Attempt] = []
    for _ in range(ATTEMPTS if goal.metric in MEASURED else 1):
        try:
            chosen = _select(rule, layers, ladders, picks, budget)
        except select.Unreachable as error:
            if not attempts:
                raise _unreachable(goal, error.smallest + fixed, before, limit) from error
            chosen = [min(range(len(options)), key=lambda i: options[i].cost) for options in layers]
        if chosen in [attempt.chosen for attempt in attempts]:
            break
        network = build([picks[at][index] for at, index in enumerate(chosen)])
        attempt = _Attempt(
            chosen, fixed + select.cost_of(layers, chosen), *_measure(goal, network, model, before, context)
        )
        attempts.append(attempt)
        context.log.info(
            "low-rank: --to %s: predicted %.4g, achieved %.4g of %.4g %s allowed",
            *(goal, attempt.predicted, attempt.achieved, limit, goal.unit),
        )
        if CLOSE * limit <= attempt.achieved <= limit:
            break
        budget += limit - attempt.achieved  # a network a little larger or smaller is mispredicted by about as much
    fitting = [attempt for attempt in attempts if attempt.achieved <= limit]
    best = max(fitting, key=_achieved) if fitting else min(attempts, key=_achieved)
    step = select.step_below(layers, best.chosen)
    if best.low > TOLERANCE * limit:
        if step == 0:
            raise _unreachable(goal, best.achieved, before, limit)
        raise PassError(
            f"low-rank: --to {goal}: {best.achieved:.4g} {goal.unit} (95 % from {best.low:.4g}) after {len(attempts)} "
            f"attempts, allowed {limit:.4g}, although smaller ranks exist; repeat on a quiet machine, or ask for less"
        )
    figures: dict[str, JsonValue] = {
        "to": str(goal),
        "select": rule,
        "unit": goal.unit,
        "before": round(before, 6),
        "limit": round(limit, 6),
        **best.figures,
        "over": round(max(0.0, best.achieved / limit - 1), 6),
        "step": round(step, 6),
        "attempts": [attempt.figures for attempt in attempts],
    }
    return Reached([picks[at][index] for at, index in enumerate(best.chosen)], figures)


@dataclass(frozen=True)
class _Attempt:
    """A network that was built and measured."""

    chosen: list[int]
    predicted: float
    achieved: float
    low: float
    high: float

    @property
    def figures(self) -> dict[str, JsonValue]:
        names = ("predicted", "achieved", "low", "high")
        return {name: round(getattr(self, name), 6) for name in names}


def _achieved(attempt: _Attempt) -> float:
    return attempt.achieved


def _unreachable(goal: Goal, smallest: float, before: float, limit: float) -> PassError:
    return PassError(
        f"low-rank: --to {goal} cannot be reached: the smallest ranks give {smallest:.4g} {goal.unit} of {before:.4g}, "
        f"asked were {limit:.4g}; raise it, or lower min_width or skip less"
    )


def _options(
    goal: Goal, ladders: Sequence[Ladder], context: Context, rule: Select, align: int, guard: float
) -> tuple[list[tuple[Option, ...]], list[list[Pick | None]]]:
    """Options of every layer, dense first, and what each stands for."""
    picks: list[list[Pick | None]] = []
    for ladder in ladders:
        found: list[Pick | None] = [None]
        for way in ladder:
            ranks = way.ranks(align, guard)
            if goal.timed and len(ranks) > TIMED_RANKS:
                ranks = tuple(ranks[round(i * (len(ranks) - 1) / (TIMED_RANKS - 1))] for i in range(TIMED_RANKS))
            found += [Pick(way, rank) for rank in ranks]
        picks.append(found)
    if goal.timed:
        picks, dense = _timed(ladders, picks, _meter(goal, context))
    else:
        dense = [_dense_cost(goal, ladder[0]) for ladder in ladders]
    layers = [
        (
            Option(rank=0, cost=whole, loss=0.0),
            *(Option(p.rank, _price(goal, p), _loss(rule, p), p.way.scheme) for p in found if p),
        )
        for whole, found in zip(dense, picks, strict=True)
    ]
    return layers, picks


def _loss(rule: Select, pick: Pick) -> float:
    return float(pick.way.losses[pick.rank]) if rule == "energy" else pick.way.penalty(pick.rank)


def _dense_cost(goal: Goal, way: Way) -> float:
    match goal.metric:
        case "macs":
            return way.dense_macs * way.candidate.calls
        case "size":
            return 4 * way.dense_params
    return way.dense_params


def _price(goal: Goal, pick: Pick) -> float:
    way = pick.way
    calls = way.candidate.calls
    match goal.metric:
        case "latency":
            assert pick.ms is not None  # _timed set it
            return pick.ms * calls
        case "params":
            return way.params(pick.rank)
        case "macs":
            return way.macs(pick.rank) * calls
        case "size":
            return 4 * way.params(pick.rank)


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


def _select(
    rule: Select,
    layers: Sequence[tuple[Option, ...]],
    ladders: Sequence[Ladder],
    picks: Sequence[Sequence[Pick | None]],
    budget: float,
) -> list[int]:
    match rule:
        case "uniform":
            shares = [
                [1.0 if pick is None else pick.way.params(pick.rank) / ladder[0].dense_params for pick in found]
                for ladder, found in zip(ladders, picks, strict=True)
            ]
            return select.uniform(layers, shares, budget)
        case "energy":
            return select.energy(layers, budget)
        case "knapsack":
            return select.knapsack(layers, budget)
        case "greedy" | "gated":  # gates have replaced the spectra
            return select.greedy(layers, budget)


def _meter(goal: Goal, context: Context) -> Meter:
    if context.meter is None:
        raise PassError(f"low-rank: --to {goal} is measured on the exported file; give a target, as ort:cpu")
    return context.meter


def cost_of(goal: Goal, model: nn.Module, context: Context) -> float:
    """What the network costs as it is."""
    if goal.metric not in MEASURED:
        assert context.backbone is not None  # Pass.__call__ set it
        return costs.count(model, context.backbone.input.size)[goal.metric]
    meter = _meter(goal, context)
    return meter.latency(model).value if goal.timed else meter.size(model).value


def _measure(
    goal: Goal, network: nn.Module, model: nn.Module, before: float, context: Context
) -> tuple[float, float, float]:
    """What the network with its new ranks costs, and the ends of its interval.

    A share of the latency is a ratio paired with the network as it is; milliseconds are milliseconds.
    """
    if not goal.timed:
        found = cost_of(goal, network, context)
        return found, found, found
    meter, scale = _meter(goal, context), 1.0
    if goal.share is None:
        timing = meter.latency(network)
    else:
        timing, scale = meter.compare(network, model, limit=goal.share), before
    assert timing.low is not None  # timings are sampled, so they have an interval
    assert timing.high is not None
    return timing.value * scale, timing.low * scale, timing.high * scale
