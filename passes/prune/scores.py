"""Scores of units, criterion by criterion, from weights and from what was seen on images.

Of attention's queries, keys and values (`dims`) every head has its own order: one for queries and keys, which only work
together, and one for values and the columns that read them. A unit is then the r-th best of every head.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from slim.passes.calibrate import Layer
from slim.passes.prune.groups import Group, Member
from slim.passes.prune.observed import Calibration, Seen, Spot, columns, variances

TINY = torch.finfo(torch.double).tiny


@dataclass(frozen=True, eq=False)
class Part:
    """Channels that are ordered on their own: a whole group, or half of one in attention."""

    members: tuple[Member, ...]
    spots: tuple[Spot, ...]
    """Where they are read; of queries and keys, which no layer reads, where they are put out."""


def parts_of(group: Group) -> list[Part]:
    """The group itself; of `dims` its queries and keys, then its values, each with heads * width units."""
    if group.kind != "dims":
        read: dict[str, list[Tensor]] = {}
        for member in group.members:
            if member.reads:
                read.setdefault(member.layer, []).append(member.index)
        return [Part(group.members, tuple(Spot(layer, torch.cat(index, 1)) for layer, index in read.items()))]
    # (heads * width, 3): row of the query, key and value
    places = torch.arange(3 * group.width).view(3, -1).T
    queries, values = places[:, :2], places[:, 2:]
    reading = [replace(member, index=places[:, :1]) for member in group.members if member.reads]
    making = [member for member in group.members if not member.reads]
    return [
        Part(
            tuple(replace(member, index=queries) for member in making),
            (Spot(making[0].layer, queries, output=True),),
        ),
        Part(
            (*(replace(member, index=values) for member in making), *reading),
            (Spot(reading[0].layer, reading[0].index),),
        ),
    ]


def by_slot(group: Group, queries: Tensor, values: Tensor) -> tuple[Group, Tensor]:
    """A group of `dims` with the best of every head first, and the scores of its units, which descend.

    queries and values: (heads * width,) fp64 each. A unit has the share that its dimensions have in the scores of their
    head, summed over the heads, of queries and values alike; the shares of a head whose scores are zero are zero.
    """
    heads, width = group.unit, group.units
    best, order = torch.stack([queries, values]).view(2, heads, width).sort(dim=2, descending=True, stable=True)
    shares = best / best.sum(2, keepdim=True).clamp(min=TINY)
    # (3, heads, width): row of the query, key or value
    grid = torch.arange(3 * heads).view(3, heads, 1) * width + order[[0, 0, 1]]
    made, read = grid.movedim(2, 0).flatten(1), (grid[2] - 2 * group.width).T
    members = tuple(replace(member, index=read if member.reads else made) for member in group.members)
    return replace(group, members=members), shares.sum((0, 1))


def unreached(part: Part, reached: Container[Spot]) -> str | None:
    """Why images say nothing of the part; none where they do.

    Some layers are called with a table of the network's own, which no gradient would tell from what has no effect.
    """
    if not part.spots:
        return "no layer reads its channels"
    missing = [spot.layer for spot in part.spots if spot not in reached]
    return f"no image reaches layer {missing[0]!r}" if missing else None


def energy(weight: Tensor, second: Tensor, mean: Tensor | None) -> Tensor:
    """(units,): tr(W G W^T) of each unit's columns W, with G the second moment of what they multiply.

    weight: (o, units, b). second: (units, b, b). mean: (units, b), for G about the mean; none: not centred.
    """
    if mean is not None:
        second = second - mean[:, :, None] * mean[:, None, :]
    each = weight.movedim(1, 0)
    found: Tensor = ((each.mT @ each) * second).sum((1, 2))
    return found.clamp(min=0)


def gram(model: nn.Module, part: Part, seen: Mapping[Spot, Seen]) -> Tensor:
    """Energy that each unit carries into its readers; of queries and keys E[q^2] E[k^2].

    That is the energy they give to the logits, up to the attention's scale, which no share of a head depends on.
    Several readers count as much as each other: by the shares of what each makes of all units.
    """
    total = torch.zeros(len(part.members[0].index), dtype=torch.double)
    for spot in part.spots:
        moments = seen[spot]
        if spot.output:
            total += moments.second.diagonal(dim1=1, dim2=2).prod(1)
            continue
        layer = cast(Layer, model.get_submodule(spot.layer))
        weight = columns(layer, spot.index).double().cpu()
        whole = max(moments.energy, TINY) if len(part.spots) > 1 else 1.0
        total += 1 / whole * energy(weight, moments.second, moments.mean if layer.bias is not None else None)
    return total


def group_l2(model: nn.Module, part: Part) -> Tensor:
    """Sum over tensors w, biases apart, of |w_u|^2 / mean(w^2): layers of different scale count the same."""
    values = dict(model.named_parameters(remove_duplicate=False))
    total = torch.zeros(len(part.members[0].index), dtype=torch.double)
    for member in part.members:
        if member.key not in values or "bias" in member.key.rpartition(".")[2]:
            continue
        squares = values[member.key].detach().double().cpu().square()
        places = squares.shape[member.dim]
        of_places = squares.movedim(member.dim, 0).reshape(places, -1).sum(1)
        total += of_places[member.index].sum(1) / squares.mean().clamp(min=TINY)
    return total


def norms_of(model: nn.Module, part: Part) -> dict[str, Tensor]:
    """Batch norm with running statistics -> (units, m): the positions of the units in it."""
    return {
        member.layer: member.index
        for member in part.members
        if isinstance(norm := model.get_submodule(member.layer), nn.BatchNorm1d | nn.BatchNorm2d)
        and norm.running_var is not None
    }


def norm_variance(norm: nn.Module, variance: Tensor) -> Tensor:
    """(C,) fp64: variance of what the batch norm puts out in eval mode, when that of its input (C,) is `variance`."""
    one = cast(nn.BatchNorm2d, norm)
    found = variance / (cast(Tensor, one.running_var).double().cpu() + one.eps)
    return found if one.weight is None else found * one.weight.detach().double().cpu().square()


def bn(model: nn.Module, parts: Sequence[Part], given: Calibration) -> list[Tensor | None]:
    """Variance that the batch norms of each part give a unit, summed over its channels; none where it has no norm."""
    norms = [norms_of(model, part) for part in parts]
    seen = variances(model, list(dict.fromkeys(name for some in norms for name in some)), given)
    out = {name: norm_variance(model.get_submodule(name), variance) for name, variance in seen.items()}
    each = [[out[name][index].sum(1) for name, index in some.items() if name in out] for some in norms]
    return [torch.stack(called).sum(0) if called else None for called in each]


def random(parts: Sequence[Part], seed: int) -> list[Tensor]:
    """Uniform in [0, 1), from a generator of its own for every part, so that no part's size touches the others."""
    seeds = torch.randint(2**31, (len(parts),), generator=torch.Generator().manual_seed(seed))
    return [
        torch.rand(len(part.members[0].index), dtype=torch.double, generator=torch.Generator().manual_seed(int(own)))
        for part, own in zip(parts, seeds, strict=True)
    ]
