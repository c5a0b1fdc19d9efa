"""What of a network is elastic, and one network of the family.

A width is the inner width of a block: hidden channels, units of an MLP, heads. What is kept of it is always the start
of one fixed order, most important first, so that every smaller network lies within the larger ones, as in
once-for-all networks (Cai et al. 2020, arXiv:1908.09791). The residual stream keeps its width. Besides widths there are
blocks that may be left out, ranks of layers (see ranks.py), and the side of the input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import JsonValue

from slim.errors import PassError
from slim.passes.elastic.blocks import Block
from slim.passes.prune.groups import Group


@dataclass(frozen=True, eq=False)
class Dim:
    """One elastic width."""

    group: Group
    choices: tuple[int, ...]
    """Units that it may keep, descending; the first is all of them."""
    order: tuple[int, ...]
    """Its units, the most important first."""


@dataclass(frozen=True)
class Rank:
    """One layer that may be two thinner ones."""

    layer: str
    """Dotted name."""
    choices: tuple[int, ...]
    """Ranks, descending; the first is 0: the layer as it is."""
    rows: int
    """Outputs of the layer."""
    inputs: int
    taps: int
    """Positions of its kernel: each input counts so often in a row of the weight."""

    @property
    def columns(self) -> int:
        """Of the weight, as a matrix."""
        return self.inputs * self.taps


@dataclass(frozen=True, order=True)
class Subnet:
    """One network of the family."""

    units: tuple[int, ...]
    """Kept by each width, in the order of the space."""
    on: tuple[bool, ...]
    """Of each block whether it is there, in the order of the space."""
    ranks: tuple[int, ...] = ()
    """Of each layer whose rank is elastic, in the order of the space; 0 is the layer as it is."""
    pixels: int = 0
    """Side of the input; 0 is the network's own."""


@dataclass(frozen=True, eq=False)
class Space:
    """All networks of the family."""

    dims: tuple[Dim, ...]
    blocks: tuple[Block, ...]
    fewest: tuple[int, ...]
    """Of each stage, how many of its blocks stay at least."""
    left: Mapping[str, str]
    """What is not elastic, and why."""
    ranks: tuple[Rank, ...] = ()
    pixels: tuple[int, ...] = (0,)
    """Sides of the input, descending; the first is 0: the network's own."""

    @property
    def largest(self) -> Subnet:
        """The network as it is."""
        return Subnet(tuple(dim.group.units for dim in self.dims), (True,) * len(self.blocks), (0,) * len(self.ranks))

    @property
    def smallest(self) -> Subnet:
        """The least of everything; of each stage's blocks those stay that lie evenly from the first to the last."""
        ranks = tuple(rank.choices[-1] for rank in self.ranks)
        return Subnet(tuple(dim.choices[-1] for dim in self.dims), self.ladder(self.fewest), ranks, self.pixels[-1])

    @cached_property
    def axes(self) -> tuple[tuple[int, ...], ...]:
        """Choices of all widths, blocks (1, 0), ranks and sides of the input, in this order, the whole first."""
        return (
            *(dim.choices for dim in self.dims),
            *((1, 0) for _ in self.blocks),
            *(rank.choices for rank in self.ranks),
            self.pixels,
        )

    def chosen(self, subnet: Subnet) -> tuple[int, ...]:
        """What a subnet has chosen of each axis."""
        return (*subnet.units, *map(int, subnet.on), *subnet.ranks, subnet.pixels)

    def of(self, chosen: Sequence[int]) -> Subnet:
        """The subnet that has chosen so of each axis."""
        blocks = len(self.dims)
        ranks = blocks + len(self.blocks)
        on = tuple(bool(one) for one in chosen[blocks:ranks])
        return Subnet(tuple(chosen[:blocks]), on, tuple(chosen[ranks:-1]), chosen[-1])

    @cached_property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of each stage's blocks."""
        numbers = range(len(self.blocks))
        return tuple(
            tuple(number for number in numbers if self.blocks[number].stage == stage)
            for stage in range(len(self.fewest))
        )

    def ladder(self, counts: Sequence[int]) -> tuple[bool, ...]:
        """Blocks that are there when each stage keeps so many, evenly from its first to its last."""
        on: list[bool] = []
        for blocks, count in zip(self.stages, counts, strict=True):
            all_of = len(blocks)
            stay = {i * (all_of - 1) // max(count - 1, 1) for i in range(count)}
            on += [place in stay for place in range(all_of)]
        return tuple(on)

    @cached_property
    def _within(self) -> tuple[int | None, ...]:
        return tuple(self._block_of(dim.group.name) for dim in self.dims)

    @cached_property
    def _ranks_within(self) -> tuple[int | None, ...]:
        return tuple(self._block_of(rank.layer) for rank in self.ranks)

    @cached_property
    def _makes_reads(self) -> tuple[tuple[dict[int, float], dict[int, float]], ...]:
        """Of each rank, for the outputs and the inputs of its layer: number of a width -> its share of them all."""
        found: list[tuple[dict[int, float], dict[int, float]]] = []
        for rank in self.ranks:
            shares: tuple[dict[int, float], dict[int, float]] = ({}, {})
            for number, dim in enumerate(self.dims):
                for member in dim.group.members:
                    if member.key == f"{rank.layer}.weight":
                        whole = (rank.rows, rank.inputs)[member.dim]
                        shares[member.dim][number] = shares[member.dim].get(number, 0.0) + member.index.numel() / whole
            found.append(shares)
        return tuple(found)

    def _block_of(self, layer: str) -> int | None:
        return next((n for n, block in enumerate(self.blocks) if layer.startswith(f"{block.name}.")), None)

    def within(self, dim: int) -> int | None:
        """Number of the block that a width lies in; none where it lies in none that may be left out."""
        return self._within[dim]

    def rank_within(self, rank: int) -> int | None:
        """Number of the block that a rank's layer lies in; none where it lies in none that may be left out."""
        return self._ranks_within[rank]

    def canonical(self, subnet: Subnet) -> Subnet:
        """The same network, with nothing said of blocks that are not there: equal networks are equal.

        A layer stays one where two would not be smaller, for others have made it narrow.
        """
        units = tuple(
            count if block is None or subnet.on[block] else dim.group.units
            for dim, count, block in zip(self.dims, subnet.units, self._within, strict=True)
        )
        ranks = tuple(
            count if (block is None or subnet.on[block]) and self._pays(number, count, units) else 0
            for number, (count, block) in enumerate(zip(subnet.ranks, self._ranks_within, strict=True))
        )
        return Subnet(units, subnet.on, ranks, subnet.pixels)

    def share_of(self, rank: int, subnet: Subnet) -> float:
        """What two layers of the subnet's rank cost, as a share of the one, with the widths that the subnet has."""
        count, (rows, columns) = subnet.ranks[rank], self._size(rank, subnet.units)
        return count * (rows + columns) / (rows * columns) if count else 1.0

    def _pays(self, rank: int, count: int, units: Sequence[int]) -> bool:
        rows, columns = self._size(rank, units)
        return count * (rows + columns) < rows * columns

    def _size(self, rank: int, units: Sequence[int]) -> tuple[float, float]:
        """Rows and columns of a layer's weight when the widths keep so many units."""

        def left(shares: Mapping[int, float]) -> float:
            return 1 - sum(share * (1 - units[n] / self.dims[n].group.units) for n, share in shares.items())

        makes, reads = self._makes_reads[rank]
        return self.ranks[rank].rows * left(makes), self.ranks[rank].columns * left(reads)

    def allows(self, subnet: Subnet) -> bool:
        """Whether each axis has one of its choices, and every stage keeps its fewest."""
        there = [0] * len(self.fewest)
        for block, on in zip(self.blocks, subnet.on, strict=True):
            there[block.stage] += on
        known = all(one in choices for one, choices in zip(self.chosen(subnet), self.axes, strict=True))
        return known and all(count >= least for count, least in zip(there, self.fewest, strict=True))

    def kept(self, subnet: Subnet) -> list[tuple[Group, list[int]]]:
        """Widths that are narrower, with the units that stay, ascending."""
        units = self.canonical(subnet).units
        return [
            (dim.group, sorted(dim.order[:count]))
            for dim, count in zip(self.dims, units, strict=True)
            if count < dim.group.units
        ]

    def skipped(self, subnet: Subnet) -> list[str]:
        """Blocks that are not there."""
        return [block.name for block, on in zip(self.blocks, subnet.on, strict=True) if not on]

    def factored(self, subnet: Subnet) -> dict[str, int]:
        """Layers that are two, and their rank."""
        ranks = self.canonical(subnet).ranks
        return {one.layer: rank for one, rank in zip(self.ranks, ranks, strict=True) if rank}

    def as_plan(self) -> dict[str, JsonValue]:
        """Plain JSON, without the groups, which are found again by name."""
        return {
            "dims": {
                dim.group.name: {
                    "kind": dim.group.kind,
                    "width": dim.group.width,
                    "unit": dim.group.unit,
                    "choices": [*dim.choices],
                    "order": [*dim.order],
                    "layers": {"makes": [*dim.group.makers], "reads": [*dim.group.readers]},
                }
                for dim in self.dims
            },
            "blocks": {block.name: block.stage for block in self.blocks},
            "fewest": [*self.fewest],
            "ranks": {
                rank.layer: {
                    "choices": [*rank.choices],
                    "rows": rank.rows,
                    "inputs": rank.inputs,
                    "taps": rank.taps,
                }
                for rank in self.ranks
            },
            "pixels": [*self.pixels],
            "left": {name: self.left[name] for name in sorted(self.left)},
        }

    @classmethod
    def from_plan(cls, plan: Mapping[str, Any], groups: Sequence[Group]) -> Space:
        """The space of a plan, with the groups of the network.

        Raises:
            PassError: the network does not have a group that the plan has, or it has another width.
        """
        found = {group.name: group for group in groups}
        for name, entry in plan["dims"].items():
            width = found[name].width if name in found else "none"
            if width != entry["width"]:
                raise PassError(
                    f"elastic: {name!r} was {entry['width']} wide when it was made elastic and is {width} now; "
                    "cut a subnet out before other passes change the structure"
                )
        return cls(
            tuple(
                Dim(found[name], tuple(entry["choices"]), tuple(entry["order"])) for name, entry in plan["dims"].items()
            ),
            tuple(Block(name, stage) for name, stage in plan["blocks"].items()),
            tuple(plan["fewest"]),
            dict(plan["left"]),
            tuple(
                Rank(name, tuple(entry["choices"]), entry["rows"], entry["inputs"], entry["taps"])
                for name, entry in plan["ranks"].items()
            ),
            tuple(plan["pixels"]),
        )
