"""The picture of `slim explain`: a bar for each layer, as an SVG that is whole by itself.

This file says what is drawn where; layers.svg.jinja draws it, and escapes every text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple

from slim.bench.charts import CHARACTER
from slim.bench.explain import LayerRow
from slim.bench.wording import printable

ROW, GAP = 17.0, 6.0
"""Height of a layer's row, and what parts the layers of one block from those of the next."""
TOP = 78.0
"""Where the rows begin, below the legend and the headings."""
MARGIN = 16.0
BAR = 230.0
"""Length of the bar of the layer with most weights, px."""
TRACK = 44.0
"""Length of the scale of a measure, px."""
LONGEST = 44
"""Characters of a name; of a longer one the end is shown."""
WORDS = 92
"""Characters of a decision; a longer one is shown when the pointer rests on it."""
MEASURES = {"sparsity": "sparse", "entropy_ratio": "H/T", "orthogonality": "orthog."}
"""Measure -> its heading."""
ENDS = {"sparsity": 1.0, "entropy_ratio": 1.25, "orthogonality": 1.0}
"""What the scale of a measure ends with; it begins with 0."""


class Dot(NamedTuple):
    """A measure of a layer on its scale."""

    left: float
    at: float
    text: str
    beyond: bool
    """Whether the variance is that of random kernels, or more."""


class Bar(NamedTuple):
    """A layer."""

    kind: str
    name: str
    y: float
    """Of its middle."""
    whole: float
    """Length for its weights before: by their square root, or small layers could not be seen."""
    kept: float
    """The share of that length that its weights have kept."""
    share: str
    dots: list[Dot]
    why: str
    title: str


class Picture(NamedTuple):
    """All layers, and where the columns begin."""

    title: str
    note: str
    width: float
    height: float
    bars_at: float
    dots_at: dict[str, float]
    """Heading -> left end of its scales."""
    random_at: float
    """Where H / T is 1."""
    why_at: float
    top: float
    bars: list[Bar]
    legend: list[tuple[str, float]]
    """Kinds that occur, and where their word begins."""


def picture(rows: Sequence[LayerRow], title: str, note: str) -> Picture:
    """Where everything goes.

    Args:
        rows: at least one.
        title: what is drawn.
        note: what kernels the measures are of.
    """
    names = [
        row.name if len(row.name) <= LONGEST else f"\N{HORIZONTAL ELLIPSIS}{row.name[1 - LONGEST :]}" for row in rows
    ]
    bars_at = MARGIN + max(map(len, names)) * CHARACTER + 10
    first = bars_at + BAR + 56
    lefts = {measure: first + place * (TRACK + 16) for place, measure in enumerate(MEASURES)}
    largest = max(row.weights_before for row in rows)
    bars, y = [], TOP + ROW / 2
    for before, (row, name) in enumerate(zip(rows, names, strict=True), -1):
        y += GAP if before >= 0 and _block(row.name) != _block(rows[before].name) else 0
        whole = BAR * (row.weights_before / largest) ** 0.5
        bars.append(
            Bar(
                kind=row.kind,
                name=printable(name),
                y=y,
                whole=whole,
                kept=whole * min(1.0, row.kept),
                share=f"{100 * row.kept:.0f} %",
                dots=[dot for measure, left in lefts.items() if (dot := _dot(row, measure, left))],
                why=printable(row.why if len(row.why) <= WORDS else f"{row.why[: WORDS - 1]}\N{HORIZONTAL ELLIPSIS}"),
                title=printable(f"{row.name}: {row.weights_before} weights, {row.weights_after} left. {row.why}"),
            )
        )
        y += ROW
    why_at = first + len(MEASURES) * (TRACK + 16) + 2
    legend, at = [], bars_at
    for kind in dict.fromkeys(row.kind for row in rows):
        legend.append((kind, at))
        at += len(kind) * CHARACTER + 34
    return Picture(
        title=printable(title),
        note=printable(note),
        width=why_at + max(len(note), *(len(bar.why) for bar in bars)) * CHARACTER + MARGIN,
        height=y + MARGIN,
        bars_at=bars_at,
        dots_at={heading: lefts[measure] for measure, heading in MEASURES.items()},
        random_at=lefts["entropy_ratio"] + TRACK / ENDS["entropy_ratio"],
        why_at=why_at,
        top=TOP,
        bars=bars,
        legend=legend,
    )


def to_svg(rows: Sequence[LayerRow], title: str, note: str) -> str:
    """The picture as a file."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("slim.bench").joinpath("layers.svg.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(picture(rows, title, note)._asdict(), bar_length=BAR, track=TRACK)


def _dot(row: LayerRow, measure: str, left: float) -> Dot | None:
    value: float | None = getattr(row, measure)
    if value is None:
        return None
    share = min(1.0, max(0.0, value / ENDS[measure]))
    return Dot(left, left + TRACK * share, f"{value:.2f}", measure == "entropy_ratio" and value >= 1)


def _block(name: str) -> str:
    """What a layer is part of: its name up to the last number before the end."""
    found = re.match(r"(.*\.\d+)\.[^.]", name)
    return found[1] if found else name.partition(".")[0]
