"""Ranks that reach what `--to` asks for: predicted layer by layer, then measured as a whole network.

What is counted (parameters, multiply-accumulates) adds up exactly. Milliseconds do not: the table holds each layer
alone, with its weights in the nearest cache, where a network of some size never has them. So the whole is built,
exported and timed, and what the table says is saved is scaled by what the last network really saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import JsonValue
from torch import nn

from slim import costs
from slim.contract import Context, Meter
from slim.errors import PassError
from slim.goal import Goal
from slim.passes.low_rank.offers import Ladder, Pick, Select, offers
from slim.passes.low_rank.select import Unreachable

ATTEMPTS = 5
"""Networks built and measured to meet a budget that is measured."""
TOLERANCE = 1.02
"""A budget in milliseconds is missed when the measured interval lies above this multiple of it."""
CLOSE = 0.97
"""A measured network that uses this share of its budget, or more, is not enlarged again."""


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
        build: the network with the given picks, with the values it will be repaired from.
        context: its meter times and exports.
        rule: how ranks are chosen; see slim/passes/low_rank/select.py.
        align: ranks are multiples of it.
        guard: largest share of the break-even rank.

    Raises:
        PassError: the budget cannot be reached, or was missed although a smaller network exists.
    """
    before = cost_of(goal, model, context)
    limit = goal.limit_of(before)
    found = offers(goal, ladders, rule=rule, align=align, guard=guard, meter=context.meter)
    gain = 1.0
    attempts: list[_Attempt] = []
    for _ in range(ATTEMPTS if goal.measured else 1):
        try:
            chosen = found.within(found.dense - (before - limit) / gain)
        except Unreachable as error:
            if not goal.measured:
                raise _unreachable(goal, before - found.dense + error.smallest, before, limit) from error
            chosen = found.cheapest  # the prediction may be wrong
        if chosen in [attempt.chosen for attempt in attempts]:
            break
        saved = found.dense - found.cost(chosen)
        measured = _measure(goal, build(found.chosen(chosen)), model, before, context)
        attempt = _Attempt(chosen, before - gain * saved, *measured)
        attempts.append(attempt)
        context.log.info(
            "low-rank: --to %s: predicted %.4g, achieved %.4g of %.4g %s allowed",
            *(goal, attempt.predicted, attempt.achieved, limit, goal.unit),
        )
        if CLOSE * limit <= attempt.achieved <= limit:
            break
        if saved > 0:  # where nothing was saved, half of what was hoped for
            gain = max((before - attempt.achieved) / saved, gain / 2)
    fitting = [attempt for attempt in attempts if attempt.achieved <= limit]
    best = max(fitting, key=_achieved) if fitting else min(attempts, key=_achieved)
    step = found.step_below(best.chosen)
    if best.low > (TOLERANCE if goal.timed else 1) * limit:
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
        "gain": round(gain, 6),
        "over": round(max(0.0, best.achieved / limit - 1), 6),
        "step": round(step, 6),
        "attempts": [attempt.figures for attempt in attempts],
    }
    return Reached(found.chosen(best.chosen), figures)


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


def _meter(goal: Goal, context: Context) -> Meter:
    if context.meter is None:
        raise PassError(f"low-rank: --to {goal} is measured on the exported file; give a target, as ort:cpu")
    return context.meter


def cost_of(goal: Goal, model: nn.Module, context: Context) -> float:
    """What the network costs as it is."""
    if not goal.measured:
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
