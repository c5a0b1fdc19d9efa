"""What subnets cost, exactly and for thousands of them: no subnet is counted as a whole.

Widths of one block share layers, whose cost is a product; those of different blocks share none. So the network falls
into parts, and what a subnet saves is the sum of what each part saves alone. That is counted on a network in which this
part alone was changed, once for every choice that is met.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from slim.passes.elastic.space import Space, Subnet


@dataclass(frozen=True)
class Part:
    """Widths and blocks that share layers with each other, and with nothing else that is elastic."""

    dims: tuple[int, ...]
    """Numbers of widths in the space."""
    blocks: tuple[int, ...]
    """Numbers of blocks."""


def parts_of(space: Space) -> tuple[Part, ...]:
    """The parts, in the order of the network's widths and then its blocks."""
    names = [block.name for block in space.blocks]
    found: list[tuple[set[tuple[bool, int]], set[str]]] = []
    for number, dim in enumerate(space.dims):
        layers = {member.layer for member in dim.group.members} | {dim.group.name}
        around = {name for name in names if any(layer.startswith(f"{name}.") for layer in layers)}
        _join(found, (True, number), layers | around)
    for number, name in enumerate(names):
        _join(found, (False, number), {name} | {other for other in names if name.startswith(f"{other}.")})
    return tuple(
        Part(
            tuple(sorted(number for is_dim, number in nodes if is_dim)),
            tuple(sorted(number for is_dim, number in nodes if not is_dim)),
        )
        for nodes, _ in found
    )


def _join(found: list[tuple[set[tuple[bool, int]], set[str]]], node: tuple[bool, int], names: set[str]) -> None:
    """Add a node to what it shares a name with, which makes one of several; in place."""
    shared = [one for one in found if one[1] & names]
    nodes, all_names = {node}, set(names)
    for one in shared:
        nodes |= one[0]
        all_names |= one[1]
    at = found.index(shared[0]) if shared else len(found)
    found[:] = [one for one in found if one not in shared]
    found.insert(at, (nodes, all_names))


class Blockwise:
    """Costs of subnets by name, such as `params`, `macs` and `size`."""

    def __init__(self, space: Space, count: Callable[[Subnet], Mapping[str, float]]) -> None:
        """Nothing is counted before it is asked for.

        Args:
            space: of the subnets.
            count: counts a network really. Its figures are sums over layers, plus what never changes.
        """
        self.space, self.count = space, count
        self.parts = parts_of(space)
        self._whole: Mapping[str, float] = {}
        self._saved: list[dict[tuple[tuple[int, ...], tuple[bool, ...]], dict[str, float]]] = [{} for _ in self.parts]

    def __call__(self, subnet: Subnet) -> dict[str, float]:
        """All costs of a subnet."""
        self._whole = self._whole or dict(self.count(self.space.largest))
        costs, one = dict(self._whole), self.space.canonical(subnet)
        for number, part in enumerate(self.parts):
            for name, saved in self._saving(number, part, one).items():
                costs[name] -= saved
        return costs

    def of(self, name: str) -> Callable[[Subnet], float]:
        """One cost as a function of the subnet."""
        return lambda subnet: self(subnet)[name]

    def _saving(self, number: int, part: Part, subnet: Subnet) -> dict[str, float]:
        choice = tuple(subnet.units[dim] for dim in part.dims), tuple(subnet.on[block] for block in part.blocks)
        known = self._saved[number]
        if choice not in known:
            largest = self.space.largest
            units, on = [*largest.units], [*largest.on]
            for dim in part.dims:
                units[dim] = subnet.units[dim]
            for block in part.blocks:
                on[block] = subnet.on[block]
            alone = Subnet(tuple(units), tuple(on))
            costs = self._whole if alone == largest else self.count(alone)
            known[choice] = {name: whole - costs[name] for name, whole in self._whole.items()}
        return known[choice]
