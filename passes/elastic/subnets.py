"""Making subnets: rungs from the largest to the smallest, random ones, mutants and crosses.

Every one is allowed and canonical; all randomness comes from the generator given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from pydantic import JsonValue

from slim.passes.elastic.space import Space, Subnet

MUTATION = 0.2
"""Probability that a width or block is drawn anew; that of AttentiveNAS (Wang et al. 2021, arXiv:2011.09011)."""


def ladder(space: Space, rungs: int) -> list[Subnet]:
    """From the largest to the smallest, everything narrowed at one pace; both included."""
    found = []
    for rung in range(rungs):
        share = rung / (rungs - 1)
        units = tuple(dim.choices[round(share * (len(dim.choices) - 1))] for dim in space.dims)
        counts = [
            len(blocks) - round(share * (len(blocks) - least))
            for blocks, least in zip(space.stages, space.fewest, strict=True)
        ]
        found.append(space.canonical(Subnet(units, space.ladder(counts))))
    return list(dict.fromkeys(found))


def drawn(space: Space, rng: Random) -> Subnet:
    """A random one. How much of it goes is drawn first, so that small and large ones are as frequent as others."""
    share = rng.random()

    def steps(most: int) -> int:
        return sum(rng.random() < share for _ in range(most))

    units = tuple(dim.choices[steps(len(dim.choices) - 1)] for dim in space.dims)
    on = [True] * len(space.blocks)
    for blocks, least in zip(space.stages, space.fewest, strict=True):
        for number in rng.sample(blocks, steps(len(blocks) - least)):
            on[number] = False
    return space.canonical(Subnet(units, tuple(on)))


def mutated(space: Space, subnet: Subnet, rng: Random) -> Subnet:
    """One with some widths and blocks drawn anew."""
    units = [
        rng.choice(dim.choices) if rng.random() < MUTATION else count
        for dim, count in zip(space.dims, subnet.units, strict=True)
    ]
    on = [rng.random() < 0.5 if rng.random() < MUTATION else one for one in subnet.on]
    return _allowed(space, units, on, rng)


def crossed(space: Space, one: Subnet, other: Subnet, rng: Random) -> Subnet:
    """One that has each width and block from either of two."""
    units = [rng.choice(pair) for pair in zip(one.units, other.units, strict=True)]
    on = [rng.choice(pair) for pair in zip(one.on, other.on, strict=True)]
    return _allowed(space, units, on, rng)


def as_json(subnet: Subnet) -> dict[str, JsonValue]:
    """Plain JSON."""
    return {"units": [*subnet.units], "on": [*subnet.on]}


def from_json(data: Mapping[str, Any]) -> Subnet:
    """What `as_json` wrote."""
    return Subnet(tuple(int(count) for count in data["units"]), tuple(bool(one) for one in data["on"]))


def _allowed(space: Space, units: Sequence[int], on: list[bool], rng: Random) -> Subnet:
    """With blocks put back, drawn at random, where a stage has too few."""
    for blocks, least in zip(space.stages, space.fewest, strict=True):
        off = [number for number in blocks if not on[number]]
        for number in rng.sample(off, max(0, least - (len(blocks) - len(off)))):
            on[number] = True
    return space.canonical(Subnet(tuple(units), tuple(on)))
