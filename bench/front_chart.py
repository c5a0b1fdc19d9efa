"""The picture of `slim family`: accuracy over cost of all subnets evaluated, as an SVG that is whole by itself.

This file says what is drawn where; front.svg.jinja draws it, and escapes every text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from itertools import pairwise
from typing import NamedTuple

from slim.bench.charts import Box, Tick, place_labels, ticks
from slim.bench.wording import number, printable
from slim.measurement import Measurement

WIDTH, HEIGHT = 664.0, 430.0
FRAME = (56.0, 66.0, 624.0, 380.0)
"""Left, top, right, bottom of the frame that points lie in."""

Place = tuple[float, float]
"""Cost in the unit of the budgets, and top-1 in percent."""


class Chosen(NamedTuple):
    """A subnet that was cut out."""

    x: float
    y: float
    label: str
    text: Box
    title: str


class Picture(NamedTuple):
    """Where everything goes, in pixels of the viewBox, y downwards."""

    title: str
    note: str
    width: float
    height: float
    frame: Box
    dots: list[Place]
    path: str
    """The best at every cost, as SVG path data."""
    chosen: list[Chosen]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    below: int
    """Points that lie below the frame: worse than the worst of the best, and not drawn."""


def picture(
    tried: Sequence[Place], front: Sequence[Place], chosen: Mapping[str, Place], unit: str, title: str, note: str
) -> Picture:
    """Where everything goes.

    Args:
        tried: every subnet that was evaluated; at least one.
        front: those that nothing beats, cheapest first; at least one.
        chosen: budget -> the subnet that was cut out for it.
        unit: of the costs: `ms`, `params`, `macs` or `bytes`.
        title: what is drawn.
        note: where it was measured, and on which images.
    """
    left, top, right, bottom = FRAME
    low = min(top1 for _, top1 in (*front, *chosen.values()))
    shown = [place for place in tried if place[1] >= low]
    x, x_ends = _scale([cost for cost, _ in shown], left, right)
    y, y_ends = _scale([top1 for _, top1 in shown], bottom, top)
    corners = [(x(cost), y(top1)) for cost, top1 in front]
    steps = [f"H{after[0]:.1f}V{after[1]:.1f}" for _, after in pairwise(corners)]
    marks = [(x(cost), y(top1)) for cost, top1 in chosen.values()]
    dots = [(x(cost), y(top1)) for cost, top1 in shown]
    places = place_labels(marks, [*chosen], [(a - 2, b - 2, a + 2, b + 2) for a, b in dots], FRAME)
    return Picture(
        title=printable(title),
        note=printable(note),
        width=WIDTH,
        height=HEIGHT,
        frame=FRAME,
        dots=dots,
        path=f"M{corners[0][0]:.1f} {corners[0][1]:.1f}{''.join(steps)}H{right:.1f}",
        chosen=[
            Chosen(*mark, label, box, f"{label}: {_words(cost, unit)}, {top1:.2f} %")
            for mark, (box, _), (label, (cost, top1)) in zip(marks, places, chosen.items(), strict=True)
        ],
        x_ticks=[Tick(x(cost), _words(cost, unit)) for cost in ticks(*x_ends)],
        y_ticks=[Tick(y(top1), f"{top1:g}") for top1 in ticks(*y_ends)],
        below=len(tried) - len(shown),
    )


def to_svg(
    tried: Sequence[Place], front: Sequence[Place], chosen: Mapping[str, Place], unit: str, title: str, note: str
) -> str:
    """The picture as a file; see `picture`."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("slim.bench").joinpath("front.svg.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(picture(tried, front, chosen, unit, title, note)._asdict())


def _words(cost: float, unit: str) -> str:
    return number(Measurement(metric="cost", value=cost, unit=unit))


def _scale(values: Sequence[float], start: float, end: float) -> tuple[Callable[[float], float], tuple[float, float]]:
    """Map from a figure to pixels, and the two ends of what is shown."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin
    return lambda value: start + (end - start) * (value - low) / (high - low), (low, high)
