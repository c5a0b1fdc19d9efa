"""Which subnets a training step takes besides the largest, from (space, seed, step) alone.

The sandwich rule takes the smallest and some at random (Yu and Huang 2019, arXiv:1903.05134; BigNAS, arXiv:2003.11142);
the ladder takes one network of a grid of widths and depths at a time, small ones more often (POA, arXiv:2408.01031).
Every process and every resumed run draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from slim.passes.elastic.space import Space, Subnet

HEAVIER = 3.0
"""How much more often the ladder takes the narrowest than the widest, and the shallowest than the deepest; POA's."""


def sandwich(space: Space, seed: int, step: int, count: int) -> list[Subnet]:
    """The smallest and `count` - 2 drawn at random: with the largest, `count` networks a step, at least 2."""
    generator = _generator(seed, step)
    return [*ends(space, seed, step), *(at_random(space, generator) for _ in range(count - 2))]


def ends(space: Space, seed: int, step: int) -> list[Subnet]:
    """The smallest alone, at every step: nothing is drawn."""
    return [space.canonical(space.smallest)]


def ladder(space: Space, seed: int, step: int) -> list[Subnet]:
    """One of the rungs. Each comes as often as it should before any comes again, in an order of its own each time."""
    rungs = _cycle(space)
    cycle, place = divmod(step, len(rungs))
    order = torch.randperm(len(rungs), generator=_generator(seed, cycle))
    return [rungs[int(order[place])]]


def at_random(space: Space, generator: torch.Generator) -> Subnet:
    """Each width, rank and side any of its choices alike; of each stage 1 block left out on average, or less.

    Any number from none to all that may go is possible, and any blocks of a stage are as likely as others.
    """
    units = tuple(_one_of(dim.choices, generator) for dim in space.dims)
    on = [True] * len(space.blocks)
    for places, fewest in zip(space.stages, space.fewest, strict=True):
        most = len(places) - fewest
        gone = int((torch.rand(most, generator=generator) < min(0.5, 1 / max(most, 1))).sum())
        for place in torch.randperm(len(places), generator=generator)[:gone].tolist():
            on[places[place]] = False
    ranks, pixels = [_one_of(rank.choices, generator) for rank in space.ranks], _one_of(space.pixels, generator)
    return space.canonical(Subnet(units, tuple(on), tuple(ranks), pixels))


def rungs_of(space: Space) -> dict[Subnet, int]:
    """The grid of uniform widths and depths without the largest, smallest first, and how often a cycle takes each.

    A rung has all widths at the same place of their choices, and ranks and the input's side with them, and all stages
    at the same place between their fewest blocks and all; those that stay lie evenly. The largest would come once in a
    cycle; it is trained in every step.
    """
    sets = [dim.choices for dim in space.dims] + [rank.choices for rank in space.ranks] + [space.pixels]
    widths = max(len(choices) for choices in sets)
    counts = [len(blocks) for blocks in space.stages]
    depths = 1 + max((count - fewest for count, fewest in zip(counts, space.fewest, strict=True)), default=0)
    found: dict[Subnet, int] = {}
    for width in _places(widths):
        units = tuple(_at(dim.choices, width) for dim in space.dims)
        ranks = tuple(_at(rank.choices, width) for rank in space.ranks)
        for depth in _places(depths):
            stay = [
                fewest + round(depth * (count - fewest)) for count, fewest in zip(counts, space.fewest, strict=True)
            ]
            subnet = space.canonical(Subnet(units, space.ladder(stay), ranks, _at(space.pixels, width)))
            times = round((HEAVIER - (HEAVIER - 1) * width) * (HEAVIER - (HEAVIER - 1) * depth))
            # Without any block the width is none either: the same network at every width.
            found.setdefault(subnet, times)
    found.pop(space.largest)
    return found


@lru_cache(maxsize=1)
def _cycle(space: Space) -> tuple[Subnet, ...]:
    """Every rung as often as a cycle takes it; asked for in each step of a training."""
    return tuple(subnet for subnet, times in rungs_of(space).items() for _ in range(times))


def _one_of(choices: Sequence[int], generator: torch.Generator) -> int:
    """Any of them; nothing is drawn where there is one alone."""
    if len(choices) == 1:
        return choices[0]
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def _at(choices: Sequence[int], share: float) -> int:
    """That at a place between the last of them, at 0, and the first, at 1."""
    return choices[round((1 - share) * (len(choices) - 1))]


def _places(count: int) -> list[float]:
    """So many places evenly from 0, the smallest, to 1; a single one is the largest."""
    return [place / (count - 1) for place in range(count)] if count > 1 else [1.0]


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
