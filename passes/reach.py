"""A choice that reaches what `--to` asks for: predicted part by part, then measured as a whole network.

What is counted (parameters, multiply-accumulates) adds up exactly. Milliseconds do not: a table holds each layer
alone, with its weights in the nearest cache, where a network of some size never has them. So the whole is built,
exported and timed, and what the table says is saved is scaled by what the last network really saved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pydantic import JsonValue

from slim import costs
from slim.contract import Context, Fed, Meter
from slim.errors import PassError
from slim.goal import Goal

Choice = TypeVar("Choice")
"""One way to compress the whole network; compared with `==`."""

ATTEMPTS = 5
"""Networks built and measured to meet a budget that is measured."""
TOLERANCE = 1.02
"""A budget in milliseconds is missed when the measured interval lies above this multiple of it."""
CLOSE = 0.97
"""A measured network that uses this share of its budget, or more, is not enlarged again."""


class Unreachable(ValueError):
    """No choice meets the budget."""

    def __init__(self, smallest: float) -> None:
        super().__init__(f"the least that can be reached is {smallest:g}")
        self.smallest = smallest
        """Least cost that can be reached."""


class Choices(Protocol[Choice]):
    """What a pass can choose from, and what it expects each choice to cost, in the unit of the goal."""

    @property
    def dense(self) -> float:
        """Cost of everything as it is."""

    @property
    def cheapest(self) -> Choice:
        """The choice of least cost."""

    def within(self, budget: float) -> Choice:
        """The best choice within `budget`. Raises Unreachable."""

    def cost(self, choice: Choice) -> float:
        """Of everything."""

    def step_below(self, choice: Choice) -> float:
        """What the smallest step down would save; 0 where there is none."""


@dataclass(frozen=True)
class Words:
    """How a pass speaks of its choices when it fails."""

    name: str
    """Of the pass."""
    what: str
    """What is made smaller: `ranks`."""
    way_out: str
    """What the user can do, besides asking for less."""


def reach(
    goal: Goal,
    choices: Choices[Choice],
    given: Fed,
    build: Callable[[Choice], Fed],
    context: Context,
    words: Words,
) -> tuple[Choice, dict[str, JsonValue]]:
    """The choice under the budget `goal`, and the figures of the whole.

    Args:
        goal: what is to be reached, as a share of what `given` costs or absolutely.
        choices: what there is to choose from.
        given: the network as it is.
        build: the network with a choice, with the values it will be repaired from, and what it is fed then.
        context: its meter times and exports.
        words: for errors and the log.

    Raises:
        PassError: the budget cannot be reached, or was missed although a smaller network exists.
    """
    before = cost_of(goal, given, context, words.name)
    limit = goal.limit_of(before)
    gain = 1.0
    attempts: list[_Attempt[Choice]] = []
    for _ in range(ATTEMPTS if goal.measured else 1):
        try:
            chosen = choices.within(choices.dense - (before - limit) / gain)
        except Unreachable as error:
            if not goal.measured:
                raise _unreachable(goal, before - choices.dense + error.smallest, before, limit, words) from error
            chosen = choices.cheapest  # the prediction may be wrong
        if chosen in [attempt.chosen for attempt in attempts]:
            break
        saved = choices.dense - choices.cost(chosen)
        measured = _measure(goal, build(chosen), given, before, context, words)
        attempt = _Attempt(chosen, before - gain * saved, *measured)
        attempts.append(attempt)
        context.log.info(
            "%s: --to %s: predicted %.4g, achieved %.4g of %.4g %s allowed",
            *(words.name, goal, attempt.predicted, attempt.achieved, limit, goal.unit),
        )
        if CLOSE * limit <= attempt.achieved <= limit:
            break
        if saved > 0:  # where nothing was saved, half of what was hoped for
            gain = max((before - attempt.achieved) / saved, gain / 2)
    fitting = [attempt for attempt in attempts if attempt.achieved <= limit]
    best = max(fitting, key=lambda one: one.achieved) if fitting else min(attempts, key=lambda one: one.achieved)
    step = choices.step_below(best.chosen)
    if best.low > (TOLERANCE if goal.timed else 1) * limit:
        if step == 0:
            raise _unreachable(goal, best.achieved, before, limit, words)
        raise PassError(
            f"{words.name}: --to {goal}: {best.achieved:.4g} {goal.unit} (95 % from {best.low:.4g}) after "
            f"{len(attempts)} attempts, allowed {limit:.4g}, although smaller {words.what} exist; repeat on a quiet "
            "machine, or ask for less"
        )
    figures: dict[str, JsonValue] = {
        "to": str(goal),
        "unit": goal.unit,
        "before": round(before, 6),
        "limit": round(limit, 6),
        **best.figures,
        "gain": round(gain, 6),
        "over": round(max(0.0, best.achieved / limit - 1), 6),
        "step": round(step, 6),
        "attempts": [attempt.figures for attempt in attempts],
    }
    return best.chosen, figures


@dataclass(frozen=True)
class _Attempt(Generic[Choice]):
    """A network that was built and measured."""

    chosen: Choice
    predicted: float
    achieved: float
    low: float
    high: float

    @property
    def figures(self) -> dict[str, JsonValue]:
        names = ("predicted", "achieved", "low", "high")
        return {name: round(getattr(self, name), 6) for name in names}


def _unreachable(goal: Goal, smallest: float, before: float, limit: float, words: Words) -> PassError:
    return PassError(
        f"{words.name}: --to {goal} cannot be reached: the smallest {words.what} give {smallest:.4g} {goal.unit} of "
        f"{before:.4g}, asked were {limit:.4g}; raise it, or {words.way_out}"
    )


def meter_of(goal: Goal, context: Context, name: str) -> Meter:
    """The meter of a goal that is measured. Raises PassError where there is no target."""
    if context.meter is None:
        raise PassError(f"{name}: --to {goal} is measured on the exported file; give a target, as ort:cpu")
    return context.meter


def cost_of(goal: Goal, network: Fed, context: Context, name: str) -> float:
    """What a network costs as it is fed; `name` of the pass, for errors."""
    if not goal.measured:
        return costs.count(network.model, network.input.size)[goal.metric]
    meter = meter_of(goal, context, name)
    return meter.latency(network).value if goal.timed else meter.size(network).value


def _measure(
    goal: Goal, network: Fed, given: Fed, before: float, context: Context, words: Words
) -> tuple[float, float, float]:
    """What the smaller network costs, and the ends of its interval.

    A share of the latency is a ratio paired with the network as it is; milliseconds are milliseconds.
    """
    if not goal.timed:
        found = cost_of(goal, network, context, words.name)
        return found, found, found
    meter, scale = meter_of(goal, context, words.name), 1.0
    if goal.share is None:
        timing = meter.latency(network)
    else:
        timing, scale = meter.compare(network, given, limit=goal.share), before
    assert timing.low is not None  # timings are sampled, so they have an interval
    assert timing.high is not None
    return timing.value * scale, timing.low * scale, timing.high * scale
