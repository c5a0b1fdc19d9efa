"""What subnets cost, exactly and for thousands of them: no subnet is counted as a whole.

Widths and ranks of one block share layers, whose cost is a product; those of different blocks share none. So the
network falls into parts, and what a subnet saves is the sum of what each part saves alone. That is counted on a network
in which this part alone was changed, once for every choice that is met, at each side of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from slim.passes.elastic.space import Space, Subnet


def parts_of(space: Space) -> tuple[tuple[int, ...], ...]:
    """Numbers of the space's axes that share layers with each other, and with nothing else; the input's side is none.

    In the order of the network's widths, its blocks and then its ranks.
    """
    names = [block.name for block in space.blocks]

    def around(layers: set[str]) -> set[str]:
        return {name for name in names if any(layer.startswith(f"{name}.") for layer in layers)}

    shares = [{member.layer for member in dim.group.members} | {dim.group.name} for dim in space.dims]
    shares += [{name} for name in names]
    shares += [{rank.layer} for rank in space.ranks]
    found: list[tuple[set[int], set[str]]] = []
    for number, layers in enumerate(shares):
        _join(found, number, layers | around(layers))
    return tuple(tuple(sorted(numbers)) for numbers, _ in found)


def _join(found: list[tuple[set[int], set[str]]], number: int, names: set[str]) -> None:
    """Add a number to what it shares a name with, which makes one of several; in place."""
    shared = [one for one in found if one[1] & names]
    numbers, all_names = {number}, set(names)
    for one in shared:
        numbers |= one[0]
        all_names |= one[1]
    at = found.index(shared[0]) if shared else len(found)
    found[:] = [one for one in found if one not in shared]
    found.insert(at, (numbers, all_names))


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
        self._whole: dict[int, Mapping[str, float]] = {}
        self._saved: dict[tuple[int, int, tuple[int, ...]], dict[str, float]] = {}

    def __call__(self, subnet: Subnet) -> dict[str, float]:
        """All costs of a subnet."""
        one = self.space.canonical(subnet)
        chosen, largest = self.space.chosen(one), replace(self.space.largest, pixels=one.pixels)
        if one.pixels not in self._whole:
            self._whole[one.pixels] = dict(self.count(largest))
        whole = self._whole[one.pixels]
        costs = dict(whole)
        for number, part in enumerate(self.parts):
            key = one.pixels, number, tuple(chosen[axis] for axis in part)
            if key not in self._saved:
                alone = [*self.space.chosen(largest)]
                for axis in part:
                    alone[axis] = chosen[axis]
                made = self.space.of(alone)
                found = whole if made == largest else self.count(made)
                self._saved[key] = {name: before - found[name] for name, before in whole.items()}
            for name, saved in self._saved[key].items():
                costs[name] -= saved
        return costs

    def of(self, name: str) -> Callable[[Subnet], float]:
        """One cost as a function of the subnet."""
        return lambda subnet: self(subnet)[name]
