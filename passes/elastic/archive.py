"""What a search found: evaluated subnets by cost, the best in each stretch of cost, and those that nothing beats.

A search keeps the best of each bucket of cost, not the best of all: a small network is worth keeping although a larger
one is more accurate. After AlphaNet (Wang et al. 2021, arXiv:2102.07954).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import JsonValue

from slim.passes.elastic import subnets
from slim.passes.elastic.space import Subnet
from slim.passes.reach import Unreachable

BUCKET = 0.025
"""Width of a bucket, as a share of the largest subnet's cost."""


@dataclass(frozen=True)
class Point:
    """A subnet that was really evaluated."""

    subnet: Subnet
    cost: float
    """In the unit of the search."""
    accuracy: float
    """In percent."""

    @property
    def rank(self) -> tuple[float, float, Subnet]:
        """Lowest for the best: the most accurate, of equals the cheapest; never equal for two subnets."""
        return -self.accuracy, self.cost, self.subnet

    def as_json(self) -> dict[str, JsonValue]:
        """Plain JSON."""
        return {"cost": round(self.cost, 6), "top1": round(self.accuracy, 4), **subnets.as_json(self.subnet)}


def archive(points: Iterable[Point], width: float) -> dict[int, Point]:
    """The best point of each bucket of so much cost, by the bucket's number. No further point makes one worse."""
    best: dict[int, Point] = {}
    for point in points:
        bucket = bucket_of(point.cost, width)
        if bucket not in best or point.rank < best[bucket].rank:
            best[bucket] = point
    return dict(sorted(best.items()))


def bucket_of(cost: float, width: float) -> int:
    """Number of the bucket that a cost lies in."""
    return int(cost / width)


def unbeaten(points: Iterable[Point]) -> tuple[Point, ...]:
    """The Pareto-optimal ones, cheapest first: each is more accurate than all that cost no more."""
    found: list[Point] = []
    for point in sorted(points, key=lambda one: (one.cost, one.rank)):
        if not found or point.accuracy > found[-1].accuracy:
            found.append(point)
    return tuple(found)


@dataclass(frozen=True)
class Front:
    """What a search returns."""

    points: tuple[Point, ...]
    """All that were evaluated, cheapest first."""
    tau: float | None
    """Kendall's rank correlation of predicted and evaluated accuracy, of subnets that the prediction did not know."""
    ridge: float | None
    """Strength of the predictor's correction; none where the sum of single changes alone predicts better."""
    proposals: int
    """Subnets that this process proposed and ranked."""
    evaluations: int
    """Subnets evaluated for this search, by all processes; what was known before does not count."""

    @property
    def optimal(self) -> tuple[Point, ...]:
        """The Pareto-optimal points, cheapest first."""
        return unbeaten(self.points)

    def best_within(self, limit: float) -> Point:
        """The most accurate point that costs no more than `limit`.

        Raises:
            Unreachable: all cost more.
        """
        within = [point for point in self.points if point.cost <= limit]
        if not within:
            raise Unreachable(min(point.cost for point in self.points))
        return min(within, key=lambda point: point.rank)
