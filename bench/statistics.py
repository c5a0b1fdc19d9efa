"""Intervals for timings that were taken in sessions and rounds. Plain functions of arrays; no clock, no network.

Calls of one session are alike in ways that calls of another are not (where its memory landed, what else the machine
did just then), so resampling calls alone promises an interval far too narrow: sessions are resampled first, then
rounds within them, and a round's calls stay together.

Axes throughout: (sessions, rounds) for one figure per round, (sessions, rounds, calls) for raw samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RESAMPLES = 2000
"""Bootstrap draws; the ends of a 95 % interval then stand on 50 draws each."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the interval: the least difference from `value` that this much sampling can tell apart."""
        return (self.high - self.low) / 2

    def leaves(self, centre: float, tolerance: float) -> bool:
        """Whether the whole interval lies outside `centre` +- `tolerance`."""
        return self.low > centre + tolerance or self.high < centre - tolerance

    def exp(self) -> Interval:
        """The interval of a ratio, from the interval of its logarithm."""
        return Interval(math.exp(self.value), math.exp(self.low), math.exp(self.high))

    def as_json(self, digits: int = 6) -> dict[str, Any]:
        """`{"value": ..., "low": ..., "high": ...}`."""
        return {name: round(getattr(self, name), digits) for name in ("value", "low", "high")}


def median(samples: Array) -> Array:
    """Median over the last axis."""
    return np.asarray(np.median(samples, axis=-1))


def quantile(share: float) -> Callable[[Array], Array]:
    """The statistic `share` quantile over the last axis; share in (0, 1)."""
    return partial(_quantile, share=share)


def _quantile(samples: Array, *, share: float) -> Array:
    return np.asarray(np.quantile(samples, share, axis=-1))


def fewest_samples(share: float) -> int:
    """Samples whose maximum bounds the `share` quantile from above with 95 % confidence: p90 29, p95 59, p99 299."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(share))


def resample(values: Array, *, generator: np.random.Generator, resamples: int = RESAMPLES) -> Array:
    """Hierarchical bootstrap draws. values: (sessions, rounds, ...). Returns (resamples, sessions * rounds * ...)."""
    sessions, rounds = values.shape[:2]
    chosen = generator.integers(0, sessions, (resamples, sessions, 1))
    inside = generator.integers(0, rounds, (resamples, sessions, rounds))
    drawn: Array = values[chosen, inside].reshape(resamples, -1)
    return drawn


def bootstrap(values: Array, statistic: Callable[[Array], Array], *, generator: np.random.Generator) -> Interval:
    """`statistic` of all values and its percentile interval. values: (sessions, rounds, ...)."""
    draws = statistic(resample(values, generator=generator))
    return _interval(float(statistic(values.reshape(-1))), draws)


def round_ratios(candidate: Array, reference: Array) -> Array:
    """Log of candidate / reference in each round. Both: (sessions, rounds, calls) ms. Returns (sessions, rounds).

    A round stands for its fastest call: what disturbs a call only ever lengthens it. Measured on a 1.6 ms network
    beside a busy core, 25 runs of a file against itself, 12 sessions of 16 rounds of 3 calls: the pooled median of
    these ratios spread by 0.84 % (sd) with a half width of 1.4 %; with 6 sessions by 1.03 % and 1.9 %; with 1 call
    instead of 3 by 1.05 %. Tried on the same calls: a round's median (0.89 %) or mean (0.78 %, but it saw a slow-down
    of 4.4 % as 4.0 %); the mean of session medians (1.3 %, with a round's median or mean 2 to 3 %: one disturbed
    session moves it); the mean of the middle half (0.71 %, but 4.0 % at worst with 6 sessions, where the median has
    2.5 %). CPU time spread like wall time: what slowed the core slowed both.
    """
    ratios: Array = np.log(candidate.min(axis=-1)) - np.log(reference.min(axis=-1))
    return ratios


def paired_ratio(candidate: Array, reference: Array, *, generator: np.random.Generator) -> Interval:
    """Median ratio candidate / reference of the rounds. Both: (sessions, rounds, calls) ms."""
    return bootstrap(round_ratios(candidate, reference), median, generator=generator).exp()


def drift(logs: Array, *, generator: np.random.Generator) -> Interval:
    """Last third of the sessions against the first, as a ratio of medians: 1 is steady. logs: (sessions, rounds)."""
    third = max(1, logs.shape[0] // 3)
    first, last = logs[:third], logs[-third:]
    draws = median(resample(last, generator=generator)) - median(resample(first, generator=generator))
    return _interval(float(median(last.reshape(-1)) - median(first.reshape(-1))), draws).exp()


def _interval(value: float, draws: Array) -> Interval:
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(value, float(low), float(high))
