"""What the latency of a subnet is made of, and which subnets tell how much each of it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random

import numpy as np
from numpy.typing import NDArray

from slim.errors import PassError
from slim.passes.elastic import subnets
from slim.passes.elastic.space import Space, Subnet

LEAST_ROWS = 30
"""Networks that terms are fitted to, at least."""
ROWS_PER_TERM = 1.2
"""Networks for each term, at least."""
HELD_OUT = 8
"""Networks that errors are of."""
FEWEST = 4
"""Networks without which there is no model."""
RUNGS = 5
"""Of the uniform ladder that is measured, from the largest to the smallest."""
IN_VAIN = 200
"""Random subnets in a row that bring nothing new, after which a space is taken to have no more."""


class Terms:
    """What the latency of a subnet is made of."""

    def __init__(self, space: Space, macs: Callable[[Subnet], float], builds: Mapping[str, str] | None = None) -> None:
        """Cheap, but for one call of `macs`.

        Args:
            space: of the subnets.
            macs: multiply-accumulates of a subnet.
            builds: group, block or layer by name -> what it is built like. Those built alike share one term.
        """
        named = builds or {}
        self.space, self.macs, self.most = space, macs, macs(space.largest)
        dims = [f"width {named.get(dim.group.name, dim.group.name)}" for dim in space.dims]
        blocks = [f"block {named.get(block.name, block.name)}" for block in space.blocks]
        ranks = [f"rank {named.get(rank.layer, rank.layer)}" for rank in space.ranks]
        pairs = ["pairs"] if ranks else []
        self.names = (*dict.fromkeys([*dims, *blocks, *ranks, *pairs]), "macs", "constant")
        self.widths = {dim.group.name: term for dim, term in zip(space.dims, dims, strict=True)}
        """Name of a group -> that of its term."""
        self.ranks = {rank.layer: term for rank, term in zip(space.ranks, ranks, strict=True)}
        """Name of a layer whose rank is elastic -> that of its term."""
        self._dims, self._blocks, self._ranks = (
            [self.names.index(one) for one in some] for some in (dims, blocks, ranks)
        )
        self._areas = {side: macs(replace(space.largest, pixels=side)) / self.most for side in space.pixels}

    def __call__(self, given: Sequence[Subnet]) -> NDArray[np.float64]:
        """(subnets, terms): how much of each term a subnet has; less of all with smaller images, but for a constant."""
        space = self.space
        found = np.zeros((len(given), len(self.names)))
        for row, subnet in zip(found, map(space.canonical, given), strict=True):
            for number, (term, dim) in enumerate(zip(self._dims, space.dims, strict=True)):
                block = space.within(number)
                if block is None or subnet.on[block]:
                    row[term] += subnet.units[number] / dim.group.units
            for term, there in zip(self._blocks, subnet.on, strict=True):
                row[term] += there
            for number, term in enumerate(self._ranks):
                block = space.rank_within(number)
                if block is None or subnet.on[block]:
                    row[term] += space.share_of(number, subnet)
                    row[-3] += subnet.ranks[number] > 0
            row *= self._areas[subnet.pixels]
            row[-2:] = self.macs(subnet) / self.most, 1.0
        return found


def rows_to_measure(terms: Terms, seed: int) -> tuple[list[Subnet], list[Subnet]]:
    """Subnets to fit to and subnets to hold out: the ladder, then random ones; the last of these are held out.

    Fewer where the space has no more, of which a quarter is held out.

    Raises:
        PassError: there are fewer than `FEWEST`.
    """
    wanted = max(LEAST_ROWS, math.ceil(ROWS_PER_TERM * len(terms.names))) + HELD_OUT
    rng, found, in_vain = Random(seed), dict.fromkeys(subnets.ladder(terms.space, RUNGS)), 0
    while len(found) < wanted and in_vain < IN_VAIN:
        one = subnets.drawn(terms.space, rng)
        in_vain = in_vain + 1 if one in found else 0
        found[one] = None
    if len(found) < FEWEST:
        raise PassError(f"subnet: {len(found)} subnets are too few for a model of latency; make more widths elastic")
    held = min(HELD_OUT, len(found) // 4)
    return [*found][:-held], [*found][-held:]
