"""Making subnets: rungs from the largest to the smallest, random ones, mutants and crosses.

Every one is allowed and canonical; all randomness comes from the generator given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from pydantic import JsonValue

from slim.passes.elastic.space import Space, Subnet

MUTATION = 0.2
"""Probability that a choice is drawn anew; that of AttentiveNAS (Wang et al. 2021, arXiv:2011.09011)."""


def ladder(space: Space, rungs: int) -> list[Subnet]:
    """From the largest to the smallest, everything made smaller at one pace; both included."""
    found = []
    for rung in range(rungs):
        share = rung / (rungs - 1)

        def at(choices: Sequence[int], share: float = share) -> int:
            return choices[round(share * (len(choices) - 1))]

        units, ranks = tuple(at(dim.choices) for dim in space.dims), tuple(at(rank.choices) for rank in space.ranks)
        counts = [
            len(blocks) - round(share * (len(blocks) - least))
            for blocks, least in zip(space.stages, space.fewest, strict=True)
        ]
        found.append(space.canonical(Subnet(units, space.ladder(counts), ranks, at(space.pixels))))
    return list(dict.fromkeys(found))


def drawn(space: Space, rng: Random) -> Subnet:
    """A random one. How much of it goes is drawn first, so that small and large ones are as frequent as others."""
    share = rng.random()

    def steps(most: int) -> int:
        return sum(rng.random() < share for _ in range(most))

    def one_of(choices: Sequence[int]) -> int:
        return choices[steps(len(choices) - 1)]

    units = tuple(one_of(dim.choices) for dim in space.dims)
    on = [True] * len(space.blocks)
    for blocks, least in zip(space.stages, space.fewest, strict=True):
        for number in rng.sample(blocks, steps(len(blocks) - least)):
            on[number] = False
    ranks = tuple(one_of(rank.choices) for rank in space.ranks)
    return space.canonical(Subnet(units, tuple(on), ranks, one_of(space.pixels)))


def mutated(space: Space, subnet: Subnet, rng: Random) -> Subnet:
    """One with some of its choices drawn anew."""
    chosen = [
        rng.choice(choices) if len(choices) > 1 and rng.random() < MUTATION else one
        for choices, one in zip(space.axes, space.chosen(subnet), strict=True)
    ]
    return _allowed(space, space.of(chosen), rng)


def crossed(space: Space, one: Subnet, other: Subnet, rng: Random) -> Subnet:
    """One that has each choice from either of two."""
    chosen = [rng.choice(pair) for pair in zip(space.chosen(one), space.chosen(other), strict=True)]
    return _allowed(space, space.of(chosen), rng)


def as_json(subnet: Subnet) -> dict[str, JsonValue]:
    """Plain JSON."""
    return {"units": [*subnet.units], "on": [*subnet.on], "ranks": [*subnet.ranks], "pixels": subnet.pixels}


def from_json(data: Mapping[str, Any]) -> Subnet:
    """What `as_json` wrote."""
    return Subnet(
        tuple(int(count) for count in data["units"]),
        tuple(bool(one) for one in data["on"]),
        tuple(int(rank) for rank in data["ranks"]),
        int(data["pixels"]),
    )


def _allowed(space: Space, subnet: Subnet, rng: Random) -> Subnet:
    """With blocks put back, drawn at random, where a stage has too few."""
    on = [*subnet.on]
    for blocks, least in zip(space.stages, space.fewest, strict=True):
        off = [number for number in blocks if not on[number]]
        for number in rng.sample(off, max(0, least - (len(blocks) - len(off)))):
            on[number] = True
    return space.canonical(replace(subnet, on=tuple(on)))
