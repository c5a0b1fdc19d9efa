"""What `--to` says: the cost a pass shall bring down, and how far.

Either the share kept of what the pass is given (`0.6x-latency`), or a limit (`4ms`, `2.1M-params`, `300M-macs`,
`2.5MB`). A share is written with `x`, so that no number can be taken for the other kind.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from slim.errors import did_you_mean

Metric = Literal["latency", "params", "macs", "size"]

UNITS: dict[Metric, str] = {"latency": "ms", "params": "params", "macs": "macs", "size": "bytes"}
PREFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
FORMS = "give the share kept, as in 0.6x-latency or 0.5x-params, or a limit, as in 4ms, 2.1M-params, 300M-macs or 2.5MB"

NUMBER = r"(?P<number>\d+(?:\.\d+)?)"
SHARE = re.compile(NUMBER + r"x-(?P<word>\w+)")
TIME = re.compile(NUMBER + "ms")
COUNT = re.compile(NUMBER + r"(?P<prefix>[kMG]?)-(?P<word>[A-Za-z]+)")
BYTES = re.compile(NUMBER + "(?P<prefix>[kMG]?)B")


@dataclass(frozen=True)
class Goal:
    """A cost and how much of it may be left: either `share` or `limit` is set."""

    text: str
    """As it was written."""
    metric: Metric
    share: float | None = None
    """Share kept of what the pass is given, in (0, 1)."""
    limit: float | None = None
    """Most that may be left, in `unit`."""

    def __str__(self) -> str:
        return self.text

    @property
    def unit(self) -> str:
        """Unit of the limit: `ms`, `params`, `macs` or `bytes`."""
        return UNITS[self.metric]

    @property
    def timed(self) -> bool:
        """Whether the cost has to be measured on a target."""
        return self.metric == "latency"

    @property
    def measured(self) -> bool:
        """Whether the cost is one of the exported file, which does not add up exactly from those of its layers."""
        return self.metric in ("latency", "size")

    def limit_of(self, before: float) -> float:
        """Most that may be left of a network that costs `before`; both in `unit`."""
        if self.limit is not None:
            return self.limit
        assert self.share is not None, "parse_goal sets one of the two"
        return self.share * before


def parse_goal(text: str) -> Goal:
    """The goal written as `text`.

    Raises:
        ValueError: not of the forms above, an unknown cost, or a number outside its range; one line.
    """
    if match := SHARE.fullmatch(text):
        metric, share = _known(text, match["word"], list(UNITS)), float(match["number"])
        if not 0 < share < 1:
            raise ValueError(f"{text!r}: the share kept must lie between 0 and 1; 0.5x-{metric} leaves half of it")
        return Goal(text, metric, share=share)
    if match := TIME.fullmatch(text):
        return Goal(text, "latency", limit=_above_zero(text, float(match["number"])))
    if match := COUNT.fullmatch(text):
        metric = _known(text, match["word"], ["params", "macs"])
    elif match := BYTES.fullmatch(text):
        metric = "size"
    else:
        raise ValueError(f"{text!r} is no goal; {FORMS}")
    # Rounded, for 1.001 * 1000 is 1000.9999999999999.
    return Goal(text, metric, limit=_above_zero(text, round(float(match["number"]) * PREFIXES[match["prefix"]], 6)))


def _known(text: str, word: str, known: list[Metric]) -> Metric:
    if word not in known:
        raise ValueError(f"{text!r}: unknown cost {word!r}{did_you_mean(word, known)}; {FORMS}")
    return word


def _above_zero(text: str, limit: float) -> float:
    if limit <= 0:
        raise ValueError(f"{text!r}: the limit must be above 0; {FORMS}")
    return limit
