"""Which widths and blocks of a network are elastic, and one network of the family.

A width is the inner width of a block: hidden channels, units of an MLP, heads. What is kept of it is always the start
of one fixed order, most important first, so that every smaller network lies within the larger ones, as in
once-for-all networks (Cai et al. 2020, arXiv:1908.09791). The residual stream keeps its width.
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


@dataclass(frozen=True, order=True)
class Subnet:
    """One network of the family."""

    units: tuple[int, ...]
    """Kept by each width, in the order of the space."""
    on: tuple[bool, ...]
    """Of each block whether it is there, in the order of the space."""


@dataclass(frozen=True, eq=False)
class Space:
    """All networks of the family."""

    dims: tuple[Dim, ...]
    blocks: tuple[Block, ...]
    fewest: tuple[int, ...]
    """Of each stage, how many of its blocks stay at least."""
    left: Mapping[str, str]
    """What is not elastic, and why."""

    @property
    def largest(self) -> Subnet:
        """The network as it is."""
        return Subnet(tuple(dim.group.units for dim in self.dims), (True,) * len(self.blocks))

    @property
    def smallest(self) -> Subnet:
        """The least of everything; of each stage's blocks those stay that lie evenly from the first to the last."""
        return Subnet(tuple(dim.choices[-1] for dim in self.dims), self.ladder(self.fewest))

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
        names = [f"{block.name}." for block in self.blocks]
        return tuple(
            next((number for number, name in enumerate(names) if dim.group.name.startswith(name)), None)
            for dim in self.dims
        )

    def within(self, dim: int) -> int | None:
        """Number of the block that a width lies in; none where it lies in none that may be left out."""
        return self._within[dim]

    def canonical(self, subnet: Subnet) -> Subnet:
        """The same network, with widths in blocks that are not there counted as whole: equal networks are equal."""
        units = [
            count if block is None or subnet.on[block] else dim.group.units
            for dim, count, block in zip(self.dims, subnet.units, self._within, strict=True)
        ]
        return Subnet(tuple(units), subnet.on)

    def allows(self, subnet: Subnet) -> bool:
        """Whether every width is one of its choices, and every stage keeps its fewest."""
        there = [0] * len(self.fewest)
        for block, on in zip(self.blocks, subnet.on, strict=True):
            there[block.stage] += on
        widths = all(count in dim.choices for dim, count in zip(self.dims, subnet.units, strict=True))
        return widths and all(count >= least for count, least in zip(there, self.fewest, strict=True))

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
        )
