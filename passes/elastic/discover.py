"""What of a network can be elastic: widths that cut cleanly, and blocks that pass their input on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from slim.goal import parse_goal
from slim.passes.elastic.blocks import IN_SKIP, Block, blocks_of
from slim.passes.elastic.gates import closed
from slim.passes.layers import skipped
from slim.passes.prune.cut import trusted
from slim.passes.prune.groups import Group, groups_of
from slim.passes.prune.prices import prices
from slim.passes.prune.widths import allowed, nearest

RESIDUAL = "its channels are those of the residual stream, or normalised together"
LEAST_SAVING = 2e-3
"""Of the network's operations: a width that saves less is no choice, as those within squeeze-and-excitation."""


@dataclass(frozen=True)
class Wanted:
    """What the user wants elastic."""

    widths: Sequence[float]
    """Shares of a width to choose from."""
    depth: float
    """Least share of a stage's blocks."""
    heads: Literal["whole", "none"]
    align: int
    floor: int
    skip: Sequence[str]
    """Patterns of names of layers and blocks that stay whole."""


@dataclass(frozen=True, eq=False)
class Found:
    """What can be elastic, before anything is ranked."""

    groups: list[Group]
    choices: list[tuple[int, ...]]
    """Units of each group, descending, all first."""
    blocks: list[Block]
    fewest: list[int]
    left: dict[str, str]


def discover(model: nn.Module, size: tuple[int, int, int], wanted: Wanted) -> Found:
    """Everything that can be elastic, and why the rest cannot.

    Args:
        model: in eval mode, on the CPU; it is copied.
        size: (C, H, W) of the network's input.
        wanted: as the pass was asked.
    """
    groups, left = groups_of(model, size, heads=wanted.heads)
    inner = [group for group in groups if group.inner]
    left |= {group.name: RESIDUAL for group in groups if not group.inner}
    modules = [name for name, _ in model.named_modules() if name]
    unwanted = skipped("elastic", wanted.skip, [*modules, *(group.name for group in groups)])
    left |= {group.name: IN_SKIP for group in inner if not unwanted.isdisjoint((group.name, *group.makers))}
    options = {group: _choices(group, wanted) for group in inner if group.name not in left}
    for group, some in options.items():
        if len(some) == 1:
            left[group.name] = f"no narrower multiple of {wanted.align} from {wanted.floor} up is near"
    several = [group for group, some in options.items() if len(some) > 1]
    worth = _savings(model, several, [options[group][-1] for group in several], size)
    left |= {name: f"would save {share:.3%} of the operations" for name, share in worth.items() if share < LEAST_SAVING}
    sure, refused = trusted(model, [group for group in several if group.name not in left], size, closed)
    blocks, fewest, whole = blocks_of(model, size, wanted.depth, unwanted)
    return Found(sure, [options[group] for group in sure], blocks, fewest, left | refused | whole)


def _choices(group: Group, wanted: Wanted) -> tuple[int, ...]:
    """Units nearest to the shares wanted, of those that make a width kernels like."""
    options = allowed(group, wanted.align, wanted.floor)
    return tuple(sorted({nearest(options, share * group.units) for share in (1.0, *wanted.widths)}, reverse=True))


def _savings(
    model: nn.Module, groups: Sequence[Group], fewest: Sequence[int], size: tuple[int, int, int]
) -> dict[str, float]:
    """Name of a group -> share of the network's operations that go with it alone at its fewest units."""
    if not groups:
        return {}
    found = prices(parse_goal("0.5x-macs"), model, groups, fewest, size)
    whole = found.cost([0] * len(groups))
    saved: dict[str, float] = {}
    for number, (group, least) in enumerate(zip(groups, fewest, strict=True)):
        gone = [0] * len(groups)
        gone[number] = group.units - least
        saved[group.name] = 1 - found.cost(gone) / whole
    return saved
