"""Where things go in the two charts of a report; the template draws them in the colours of the page.

Pixels are those of the SVG's viewBox, y downwards. Nothing here knows about colours, HTML or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from slim.bench.report import Report
from slim.bench.wording import Row, gain, interval, number, rows
from slim.measurement import Measurement

WIDTH = 460
"""Width of both charts: beside each other on a 1000 px page, still legible when a phone shows them at 0.75."""
CHARACTER = 6.7
"""Generous width of a character at the labels' 12 px; a label that is really narrower overlaps nothing either."""
LINE = 14.0
"""Height of a label."""
WIDE_SPREAD = 25.0
"""Points between best and worst from which accuracy is drawn on a scale that spreads the top (see `_error_scale`)."""
PLOT = (46.0, 22.0, 444.0, 284.0)
"""Left, top, right, bottom of the scatter's frame."""

TURNS = (0, -2, 2, 8, -6, 6, -4, 4, -1, 1, -3, 3, -5, 5, -7, 7)
"""Where a label may stand, in sixteenths of a circle, most welcome first: right of its mark, a little up, ..."""
MS_PANEL = (112.0, 252.0)
"""Left and right end of the waterfall's milliseconds; their text stands to the right."""
POINTS_ZERO = 388.0
"""x of no change in the waterfall's points."""
POINTS_REACH = 26.0
"""Longest bar of points, to either side."""
DWARFED = 8.0
"""A bar of points this many times the next one is cut short."""
TOP, ROW = 40.0, 30.0
"""Middle of the waterfall's first row, and from one row to the next."""
LATENCY, ACCURACY = "latency_p50_ms", "accuracy_top1"

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


class Point(NamedTuple):
    """One network in the scatter: its marker, its error bars (None where there is no interval), its label."""

    kind: str
    label: str
    title: str
    x: float
    y: float
    across: tuple[float, float] | None
    upright: tuple[float, float] | None
    text: Box
    leader: bool
    """Whether the label lies so far off that a line must lead to it."""


class Tick(NamedTuple):
    """A place on an axis and what is written there."""

    at: float
    text: str


class Scatter(NamedTuple):
    """Latency to the right, accuracy upwards."""

    height: int
    frame: Box
    points: list[Point]
    path: str
    """From dense through the kept steps to final, as SVG path data."""
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    stretched: bool
    """Whether the accuracy axis spreads the top."""
    left_out: list[str]
    """Steps that lack one of the two figures."""


class Bar(NamedTuple):
    """One row of the waterfall. `ms` and `points` are (left, right); None where nothing was measured."""

    label: str
    kind: str
    y: float
    link: tuple[float, float] | None
    """x of the latency the step was given, and y of the row that left it: a line comes down from there."""
    ms: tuple[float, float] | None
    ms_text: str
    ms_tone: str
    """`whole` for a latency; for a change `better`, `worse`, or `even` where the intervals overlap."""
    points: tuple[float, float] | None
    points_text: str
    points_tone: str
    clipped: bool
    """Whether the bar of points is cut short because it would dwarf all others."""


class Waterfall(NamedTuple):
    """Per step, milliseconds given and points cost."""

    height: float
    zero: float
    """x of no change in the panel of points."""
    bars: list[Bar]


class Change(NamedTuple):
    """What one row of the step table did to the network it was given."""

    row: Row
    before: Measurement | None
    """Latency it was given."""
    after: Measurement | None
    """Latency it left."""
    points: Measurement | None
    """Accuracy it left minus accuracy it was given; for `final` against dense."""
    source: int
    """Row that left what this one was given."""


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers within low..high, about `wanted` of them."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def scatter(report: Report) -> Scatter | None:
    """Latency against accuracy of every network that has both; None with fewer than two of them."""
    lines = [row for row in rows(report) if row.kind != "not run"]
    shown = [row for row in lines if LATENCY in row.figures and ACCURACY in row.figures]
    if len(shown) < 2:
        return None
    speed = [row.figures[LATENCY] for row in shown]
    accuracy = [row.figures[ACCURACY] for row in shown]
    left, top, right, bottom = PLOT
    stretched = max(a.value for a in accuracy) - min(a.value for a in accuracy) > WIDE_SPREAD
    rise = _error_scale(max(a.n for a in accuracy)) if stretched else float
    x, x_low, x_high = _scale(speed, float, left, right)
    y, y_low, y_high = _scale(accuracy, rise, bottom, top)
    marks = [(x(s.value), y(rise(a.value))) for s, a in zip(speed, accuracy, strict=True)]
    across = [_ends(s, float, x) for s in speed]
    upright = [_ends(a, rise, y) for a in accuracy]
    labels = [row.label if len(shown) <= 10 else row.label.split()[0] for row in shown]
    labels = [shorten(label, 18) for label in labels]
    bars = [(min(e), my - 1, max(e), my + 1) for e, (_, my) in zip(across, marks, strict=True) if e]
    bars += [(mx - 1, min(e), mx + 1, max(e)) for e, (mx, _) in zip(upright, marks, strict=True) if e]
    trail = [mark for row, mark in zip(shown, marks, strict=True) if row.kind != "rolled back"]
    bars += [box for start, end in pairwise(trail) for box in _along(start, end)]
    places = place_labels(marks, labels, bars, (left, top - 14, WIDTH, bottom))
    points = [
        Point(row.kind, label, _title(row), mark[0], mark[1], ax, up, box, far)
        for row, label, mark, ax, up, (box, far) in zip(shown, labels, marks, across, upright, places, strict=True)
    ]
    steps = [10, 30, 50, 70, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9]
    y_values = [float(t) for t in steps if y_low <= rise(t) <= y_high] if stretched else ticks(y_low, y_high)
    return Scatter(
        height=330,
        frame=PLOT,
        points=points,
        path="M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in trail),
        x_ticks=[Tick(x(t), f"{t:g}") for t in ticks(x_low, x_high)],
        y_ticks=_apart([Tick(y(rise(t)), f"{t:g}") for t in y_values], LINE),
        stretched=stretched,
        left_out=[row.label for row in lines if row not in shown],
    )


def place_labels(
    marks: Sequence[tuple[float, float]], labels: Sequence[str], obstacles: Sequence[Box], frame: Box
) -> list[tuple[Box, bool]]:
    """A box for each label near its mark that covers no other label, and, where it can, no mark and no obstacle.

    Returns (box, whether it lies so far from its mark that a line must lead to it) in the order of `labels`.
    """
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in marks]
    placed: list[tuple[Box, bool]] = []
    for (x, y), label in zip(marks, labels, strict=True):
        best, least = None, math.inf
        for radius in (13.0, 22.0, 34.0, 50.0, 70.0, 95.0, 125.0, 160.0, 200.0):
            for turn in TURNS:
                box = _label_box(x, y, radius, turn * math.pi / 8, len(label) * CHARACTER)
                on_labels = sum(_overlap(box, other, 2) for other, _ in placed)
                outside = _area(box) - _overlap(box, frame)
                covered = sum(_overlap(box, other) for other in (*taken, *obstacles))
                cost = 1000 * (on_labels + outside) + 10 * covered + radius
                if cost < least:
                    best, least = (box, radius > 34), cost
        assert best is not None
        placed.append(best)
    return placed


def waterfall(report: Report) -> Waterfall | None:
    """What each step gave and cost; None when nothing was measured."""
    found = changes(report)
    slowest = max((change.after.value for change in found if change.after), default=0.0)
    shifts = sorted((abs(change.points.value) for change in found if change.points), reverse=True)
    if not slowest and not shifts:
        return None
    # Training from scratch gives 88 points, compression costs 0.2: the one is cut short so that the other is seen.
    small = next((less for more, less in pairwise(shifts) if 0 < less < more / DWARFED), None)
    limit = 1.5 * small if small else max(shifts, default=0.0) or 1.0
    bars = [_bar(change, index, slowest or 1.0, limit) for index, change in enumerate(found)]
    return Waterfall(height=TOP + ROW * len(bars) - 6, zero=POINTS_ZERO, bars=bars)


def changes(report: Report) -> list[Change]:
    """Each row against what it was given: the step before in the same stage, else the last network that was kept."""
    found = []
    kept: dict[str, Measurement] = {}
    trial, stage, source, kept_source = kept, 0, 0, 0
    for index, row in enumerate(rows(report)):
        if row.step is None or row.step.stage != stage:
            trial, source = kept, kept_source
        stage = row.step.stage if row.step else stage
        figures = {metric: row.figures[metric] for metric in (LATENCY, ACCURACY) if metric in row.figures}
        given = report.dense if row.kind == "final" else trial
        points = gain(row.figures) if row.kind == "final" else _shift(given.get(ACCURACY), figures.get(ACCURACY))
        found.append(Change(row, trial.get(LATENCY), figures.get(LATENCY), points, source))
        trial = trial | figures
        source = index if LATENCY in figures else source
        if row.kind in ("dense", "kept"):
            kept, kept_source = trial, source
    return found


def _shift(before: Measurement | None, after: Measurement | None) -> Measurement | None:
    if before is None or after is None:
        return None
    return Measurement(metric="top1_change", value=after.value - before.value, unit="points", n=after.n)


def _bar(change: Change, index: int, slowest: float, limit: float) -> Bar:
    row, before, after, points, source = change
    left, right = MS_PANEL
    x = [left + (right - left) * latency.value / slowest if latency else None for latency in (before, after)]
    ms, text, tone = None, "", "whole"
    if after and x[1] is not None:
        step = Measurement(metric="latency_change", value=after.value - before.value, unit="ms") if before else None
        if step is None or x[0] is None or row.kind in ("dense", "final"):
            ms, text = (left, x[1]), number(after)
        elif before:
            ms, text, tone = (min(x[0], x[1]), max(x[0], x[1])), number(step, sign=True), _tone(before, after)
    size = max(-1.0, min(1.0, points.value / limit)) * POINTS_REACH if points else 0.0
    return Bar(
        label=shorten(row.label, 15),
        kind=row.kind,
        y=TOP + ROW * index,
        link=(x[0], TOP + ROW * source) if x[0] is not None and row.kind != "not run" else None,
        ms=ms,
        ms_text=text,
        ms_tone=tone,
        points=(min(POINTS_ZERO, POINTS_ZERO + size), max(POINTS_ZERO, POINTS_ZERO + size)) if points else None,
        points_text=number(points, sign=True).removesuffix(" points") if points else "",
        points_tone="even" if not size else "better" if size > 0 else "worse",
        clipped=points is not None and abs(points.value) > limit,
    )


def _tone(before: Measurement, after: Measurement) -> str:
    if None not in (before.low, before.high, after.low, after.high) and not _disjoint(before, after):
        return "even"
    return "better" if after.value < before.value else "worse" if after.value > before.value else "even"


def _disjoint(one: Measurement, other: Measurement) -> bool:
    ends = [(m.value if m.low is None else m.low, m.value if m.high is None else m.high) for m in (one, other)]
    return ends[0][1] < ends[1][0] or ends[1][1] < ends[0][0]


def _error_scale(n: int) -> Callable[[float], float]:
    """Accuracy on the logarithm of its error, so that 98.0 and 98.4 lie apart although 10 is in the picture too.

    An accuracy of 100 % on `n` images is drawn as half an image wrong: the logarithm of no error is nowhere.
    """
    return lambda accuracy: -math.log10(max(100.0 - accuracy, 50.0 / n))


def _scale(
    figures: Sequence[Measurement], rise: Callable[[float], float], start: float, end: float
) -> tuple[Callable[[float], float], float, float]:
    """Map from a figure (already through `rise`) to pixels, and the two ends of what is shown."""
    ends = [rise(end) for m in figures for end in (m.value, m.low, m.high) if end is not None]
    low, high = min(ends), max(ends)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin
    return lambda value: start + (end - start) * (value - low) / (high - low), low, high


def _ends(
    figure: Measurement, rise: Callable[[float], float], to_pixels: Callable[[float], float]
) -> tuple[float, float] | None:
    if figure.low is None or figure.high is None:
        return None
    return to_pixels(rise(figure.low)), to_pixels(rise(figure.high))


def _apart(found: list[Tick], room: float) -> list[Tick]:
    """The ticks, without those that come nearer than `room` to one already taken; the last, topmost one comes first."""
    taken: list[Tick] = []
    for tick in reversed(found):
        if not taken or abs(taken[-1].at - tick.at) >= room:
            taken.append(tick)
    return taken


def _title(row: Row) -> str:
    figures = (row.figures[LATENCY], row.figures[ACCURACY])
    said = (f"{number(f)} ({interval(f)})" if interval(f) else number(f) for f in figures)
    return f"{row.label}: {', '.join(said)}{f', {row.verdict}' if row.verdict else ''}"


def _along(start: tuple[float, float], end: tuple[float, float]) -> list[Box]:
    """Small boxes on the line from start to end."""
    count = max(1, round(math.dist(start, end) / 8))
    places = [[a + (b - a) * i / count for a, b in zip(start, end, strict=True)] for i in range(count + 1)]
    return [(x - 2, y - 2, x + 2, y + 2) for x, y in places]


def shorten(text: str, characters: int) -> str:
    """`text`, or its beginning and an ellipsis."""
    return text if len(text) <= characters else text[: characters - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _label_box(x: float, y: float, radius: float, angle: float, width: float) -> Box:
    """Box whose near edge lies `radius` from the mark in direction `angle` (0 is right, a quarter turn is down)."""
    cx = x + math.cos(angle) * (radius + width / 2 if abs(math.cos(angle)) > 0.1 else 0)
    cy = y + math.sin(angle) * (radius + LINE / 4)
    return cx - width / 2, cy - LINE / 2, cx + width / 2, cy + LINE / 2


def _overlap(one: Box, other: Box, gap: float = 0.0) -> float:
    """Shared area, with `other` grown by `gap` all round."""
    wide = min(one[2], other[2] + gap) - max(one[0], other[0] - gap)
    high = min(one[3], other[3] + gap) - max(one[1], other[1] - gap)
    return max(0.0, wide) * max(0.0, high)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
