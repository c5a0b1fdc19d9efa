"""What of a network can be elastic: widths that cut cleanly, blocks that pass their input on, ranks, smaller images."""

from __future__ import annotations

import copy
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from slim import surgery
from slim.errors import PassError
from slim.goal import parse_goal
from slim.passes.elastic.blocks import IN_SKIP, Block, blocks_of
from slim.passes.elastic.gates import closed
from slim.passes.elastic.ranks import projected, split
from slim.passes.elastic.space import Rank
from slim.passes.layers import skipped
from slim.passes.low_rank import schemes
from slim.passes.low_rank.candidates import candidates
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
    ranks: Sequence[float] = (1.0,)
    """Shares of a layer's operations that two thinner ones may have."""
    min_width: int = 64
    """Inputs and outputs from which a layer may be two."""
    pixels: Sequence[int] = ()
    """Smaller sides of the input."""


@dataclass(frozen=True, eq=False)
class Found:
    """What can be elastic, before anything is ranked."""

    groups: list[Group]
    choices: list[tuple[int, ...]]
    """Units of each group, descending, all first."""
    blocks: list[Block]
    fewest: list[int]
    ranks: list[Rank]
    pixels: tuple[int, ...]
    """Sides of the input, descending, with 0 for the network's own in front."""
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
    ranks, dense = _ranks(model, size, wanted, unwanted)
    pixels, other = _pixels(model, size, wanted.pixels)
    left |= refused | whole | dense | other
    return Found(sure, [options[group] for group in sure], blocks, fewest, ranks, pixels, left)


def _ranks(
    model: nn.Module, size: tuple[int, int, int], wanted: Wanted, unwanted: Container[str]
) -> tuple[list[Rank], dict[str, str]]:
    """Layers that may be two, each at the shares wanted, and why the others may not."""
    if all(share == 1 for share in wanted.ranks):
        return [], {}
    pairs = frozenset(name for name, module in model.named_modules() if schemes.scheme_of(module))
    found, left = candidates(model, size, min_width=wanted.min_width, factored=pairs)
    ranks = []
    for one in found:
        even = schemes.break_even(one.layer, "channel")
        choices = {int(share * even) // wanted.align * wanted.align for share in wanted.ranks if share < 1} - {0}
        if isinstance(one.layer, nn.Conv2d) and one.layer.groups > 1:
            left[one.name] = "it has groups"
        elif one.name in unwanted:
            left[one.name] = IN_SKIP
        elif not choices:
            left[one.name] = f"no rank of {wanted.align} or more pays"
        else:
            weight = one.layer.weight
            rows, inputs, taps = weight.shape[0], weight.shape[1], weight[0, 0].numel()
            ranks.append(Rank(one.name, (0, *sorted(choices, reverse=True)), rows, inputs, taps))
    sure = ranks if _same_as_two(model, ranks, size) else [one for one in ranks if _same_as_two(model, [one], size)]
    left |= {rank.layer: "two layers do not compute what it does" for rank in ranks if rank not in sure}
    return sure, {f"rank of {name}": why for name, why in left.items()}


def _same_as_two(model: nn.Module, ranks: Sequence[Rank], size: tuple[int, int, int]) -> bool:
    """Whether the network with two layers in the place of each computes what it does with its output projected."""
    loud, images = surgery.audible(model), torch.randn(1, *size, generator=torch.Generator().manual_seed(1))
    gated, smaller, least = copy.deepcopy(loud), copy.deepcopy(loud), {one.layer: one.choices[-1] for one in ranks}
    projected(gated, least)
    try:
        split(loud, least)(smaller, {})
        with torch.no_grad():
            return surgery.close(smaller(images), gated(images))
    except Exception:  # whatever a network can raise that reads a layer's weight itself
        return False


def _pixels(
    model: nn.Module, size: tuple[int, int, int], wanted: Sequence[int]
) -> tuple[tuple[int, ...], dict[str, str]]:
    """Sides of the input that the network takes, and why it does not take others.

    Raises:
        PassError: the input is not square, or a side is none that is smaller.
    """
    if not wanted:
        return (0,), {}
    _, height, width = size
    if height != width:
        raise PassError(f"elastic: pixels are sides of square images, and the input is {height}x{width}; leave it out")
    if wrong := [side for side in wanted if not 0 < side < height]:
        raise PassError(f"elastic: pixels {wrong[0]} is no smaller side than the input's {height}; give smaller ones")
    sides, left = [], {}
    for side in sorted(set(wanted), reverse=True):
        try:
            with surgery.in_eval(model):
                model(torch.zeros(1, size[0], side, side))
            sides.append(side)
        except Exception as error:  # a network checks its input in as many ways as there are networks
            left[f"{side} pixels"] = f"the network does not take them: {' '.join(str(error).split())[:100]}"
    return (0, *sides), left


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
