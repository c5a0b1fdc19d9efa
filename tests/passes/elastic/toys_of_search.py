"""A space made by hand, and what its subnets cost and score: written down, so that every answer is known."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from slim.passes.elastic.blocks import Block
from slim.passes.elastic.space import Dim, Space, Subnet
from slim.passes.prune.groups import Group, Member


def dim(name: str, units: int, choices: tuple[int, ...]) -> Dim:
    index = torch.arange(units)[:, None]
    members = (Member(f"{name}.weight", 0, index), Member(f"{name}_next.weight", 1, index, reads=True))
    return Dim(Group(name, "channels", units, 1, members, True), choices, tuple(range(units)))


def space(blocks: int, choices: tuple[int, ...] = (8, 6, 4, 2), fewest: int = 1) -> Space:
    """A width in front of all blocks, then in each block one width; all blocks in one stage."""
    names = [f"blocks.{number}" for number in range(blocks)]
    dims = (dim("stem", choices[0], choices), *(dim(f"{name}.fc1", choices[0], choices) for name in names))
    return Space(dims, tuple(Block(name, 0) for name in names), (fewest,), {})


def all_of(of: Space) -> Iterator[Subnet]:
    """Every subnet once."""
    widths = itertools.product(*(one.choices for one in of.dims))
    there = [*itertools.product((True, False), repeat=len(of.blocks))]
    made = (of.canonical(Subnet(units, on)) for units in widths for on in there)
    yield from dict.fromkeys(one for one in made if of.allows(one))


def shares(of: Space, subnet: Subnet) -> list[float]:
    """What is there of each width, 0 where its block is not."""
    inside = [of.within(number) for number in range(len(of.dims))]
    return [
        count / one.group.units if block is None or subnet.on[block] else 0.0
        for one, count, block in zip(of.dims, subnet.units, inside, strict=True)
    ]


def cost(of: Space, subnet: Subnet) -> float:
    """A constant, and for each width what is there of it; those further back cost more."""
    return 10.0 + sum((5 + number) * share for number, share in enumerate(shares(of, subnet)))


def accuracy(of: Space, subnet: Subnet, interaction: float) -> float:
    """Percent: points for what each width lacks, the more the further back; `interaction` for lacks side by side."""
    lacks = [1 - share for share in shares(of, subnet)]
    alone = sum((2 + 3 * number % 7) * lack**2 for number, lack in enumerate(lacks))
    return 90.0 - alone - interaction * sum(one * other for one, other in itertools.pairwise(lacks))
