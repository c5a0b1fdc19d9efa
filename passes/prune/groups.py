"""Which channels of a network can go together: found in torch-pruning's dependency graph, believed once tried.

A group is all places where one set of channels is made, normalised and read (Fang et al. 2023, arXiv:2301.12900). The
graph is traced through autograd and mistakes axes in some token mixers, so no group is taken on trust: its channels are
set to zero in one copy of the network and cut out of another, and both must compute the same (see cut.py).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from slim import surgery

Kind = Literal["channels", "heads", "dims"]
Attributes = dict[str, dict[str, float]]
"""Module -> attribute -> value."""

GRAPH = "the dependency graph finds no consistent channels there"
SHARED = "its weights belong to another group"
TIED = "several layers share a weight there"
UNCALLED = "the network does not call it"
MERGING = {"PatchMerging": 4}
"""Module -> neighbours that its layers read side by side, which the graph does not see: channel c of the n-th lies at
n * channels + c. Liu et al. 2021, arXiv:2103.14030."""


@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of one tensor in which the channels of a group lie."""

    key: str
    """State-dict key."""
    dim: int
    index: Tensor
    """(units, m) int64: positions of each unit."""
    reads: bool = False
    """Whether the channels are read here; else they are made, or normalised."""

    @property
    def layer(self) -> str:
        """Dotted name of the module that has the tensor."""
        return self.key.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that are kept or cut together, unit by unit."""

    name: str
    """The layer that makes them; `:heads` or `:dims` behind it in attention."""
    kind: Kind
    units: int
    unit: int
    """Channels of one unit: more than one in attention heads and where a convolution has groups."""
    members: tuple[Member, ...]
    inner: bool
    """Whether they stay within a block, and cutting out what is zero changes nothing; false for the residual stream and
    where a norm takes its statistics over them."""
    per_unit: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Module -> attribute -> its share for one unit: `{"blocks.0.attn": {"num_heads": 1}}`."""
    scale: float | None = None
    """Of `dims`: the attention's scale with all units."""

    @property
    def width(self) -> int:
        """Channels of all units."""
        return self.units * self.unit

    @property
    def readers(self) -> tuple[str, ...]:
        """Layers that read the channels."""
        return tuple(dict.fromkeys(one.layer for one in self.members if one.reads))

    @property
    def makers(self) -> tuple[str, ...]:
        """Layers and norms that make them."""
        return tuple(dict.fromkeys(one.layer for one in self.members if not one.reads))

    def attributes(self, units: int) -> Attributes:
        """What modules have to say of themselves when so many units stay."""
        found: Attributes = {
            module: {name: each * units for name, each in shares.items()} for module, shares in self.per_unit.items()
        }
        if self.scale is not None:
            (module,) = self.per_unit
            found[module]["scale"] = self.scale * (self.units / units) ** 0.5
        return found


def groups_of(
    model: nn.Module, size: tuple[int, int, int], *, heads: Literal["whole", "dims", "none"] = "whole"
) -> tuple[list[Group], dict[str, str]]:
    """Groups as the graph has them, in the order of the network, and why other layers' channels have none.

    Args:
        model: in eval mode; it is copied and traced with noise of `size` (C, H, W).
        size: of the network's input.
        heads: what one unit of attention is: a head, one dimension of the queries, keys and values of every head, or
            nothing.
    """
    traced = copy.deepcopy(model).requires_grad_(True)
    attention = {name: module for name, module in traced.named_modules() if is_attention(module)}
    found, left = _from_graph(traced, size, attention)
    for name, module in attention.items():
        group = _attention(name, module, heads)
        if isinstance(group, Group):
            found.append(group)
        else:
            left[f"{name}.qkv"] = group
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    found = sorted(found, key=lambda group: order[group.name.partition(":")[0]])
    return _alone(traced, _coupled(traced, found, left), left), left


def positions(state: Mapping[str, Tensor], kept: Sequence[tuple[Group, Sequence[int]]]) -> surgery.Positions:
    """What stays of every tensor in `state` when each group keeps the given units."""
    stays: dict[str, dict[int, Tensor]] = {}
    for group, units in kept:
        gone = torch.ones(group.units, dtype=torch.bool)
        gone[list(units)] = False
        for member in group.members:
            whole = torch.ones(state[member.key].shape[member.dim], dtype=torch.bool)
            stays.setdefault(member.key, {}).setdefault(member.dim, whole)[member.index[gone].flatten()] = False
    return {key: {dim: mask.nonzero()[:, 0].tolist() for dim, mask in dims.items()} for key, dims in stays.items()}


def attributes(kept: Sequence[tuple[Group, int]]) -> Attributes:
    """What modules have to say of themselves when each group keeps so many units."""
    found: Attributes = {}
    for group, units in kept:
        for module, values in group.attributes(units).items():
            found.setdefault(module, {}).update(values)
    return found


def is_attention(module: nn.Module) -> bool:
    """Whether it is timm's attention with one layer for queries, keys and values, plain or over windows."""
    if type(module).__name__ not in ("Attention", "WindowAttention"):
        return False
    return isinstance(getattr(module, "qkv", None), nn.Linear) and isinstance(getattr(module, "proj", None), nn.Linear)


def _attention(name: str, module: Any, heads: str) -> Group | str:
    """The group of one attention, or why it has none."""
    rows, count = module.qkv.out_features, getattr(module, "num_heads", 0)
    if heads == "none":
        return "heads is none"
    if not count or not isinstance(getattr(module, "scale", None), float):
        return "it does not say its heads or their scale"
    width = rows // 3 // count
    if getattr(module, "gate", None) is not None or not isinstance(getattr(module, "norm", nn.Identity()), nn.Identity):
        return "its output is gated or normalised over the heads"
    if rows != 3 * count * width or module.proj.in_features != count * width:
        return "its queries, keys and values differ in width"
    normed = any(not isinstance(getattr(module, norm, nn.Identity()), nn.Identity) for norm in ("q_norm", "k_norm"))
    if heads == "dims" and normed:
        return "its queries and keys are normalised"
    # (3, heads, width): row of the query, key or value
    grid = torch.arange(rows).view(3, count, width)
    whole = heads == "whole"
    made = grid.movedim(1 if whole else 2, 0).flatten(1)
    members = [Member(f"{name}.qkv.weight", 0, made)]
    if module.qkv.bias is not None:
        members.append(Member(f"{name}.qkv.bias", 0, made))
    members.append(Member(f"{name}.proj.weight", 1, grid[0] if whole else grid[0].T, reads=True))
    shares = {"num_heads": 1} if whole else {}
    if hasattr(module, "attn_dim"):
        shares["attn_dim"] = width if whole else count
    if hasattr(module, "head_dim") and not whole:
        shares["head_dim"] = 1
    if whole and hasattr(module, "relative_position_bias_table"):
        members.append(Member(f"{name}.relative_position_bias_table", 1, torch.arange(count)[:, None]))
    return Group(
        name=f"{name}.qkv:{'heads' if whole else 'dims'}",
        kind="heads" if whole else "dims",
        units=count if whole else width,
        unit=width if whole else count,
        members=tuple(members),
        inner=True,
        per_unit={name: shares},
        scale=None if whole else module.scale,
    )


def _from_graph(
    model: nn.Module, size: tuple[int, int, int], attention: Mapping[str, nn.Module]
) -> tuple[list[Group], dict[str, str]]:
    """One group for each set of channels that a layer makes, apart from those within attention."""
    from torch_pruning import DependencyGraph

    names = {module: name for name, module in model.named_modules()}
    values = {id(value): name for name, value in model.named_parameters()}
    heads = surgery.classifiers(model)
    within = {f"{name}.qkv" for name in attention}
    merging = {name: MERGING.get(type(module).__name__, 1) for name, module in model.named_modules()}
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of parameters outside of layers, which it finds well
        try:
            # Given a function, for else it takes the batch for a list of arguments.
            graph = DependencyGraph().build_dependency(model, images, lambda net, x: net(x), verbose=False)
        except Exception as error:  # whatever tracing an unknown network can raise
            reason = f"torch-pruning cannot trace the network ({' '.join(str(error).split())[:100]})"
            return [], dict.fromkeys(layers, reason)
        found: list[Group] = []
        left: dict[str, str] = {}
        made: set[str] = set()
        for name in layers:
            module = model.get_submodule(name)
            if name in made or name in within:
                continue
            if module not in graph.module2node:
                left[name] = UNCALLED
                continue
            try:
                cut = graph.get_pruner_of_module(module).prune_out_channels
                items = list(graph.get_pruning_group(module, cut, list(range(len(cast(Tensor, module.weight))))))
                members = [*_members(graph, items, names, values, merging)]
            except Exception:  # index errors and others where it takes one axis for another
                left[name] = GRAPH
                continue
            makers = {one.layer for one in members if not one.reads}
            made |= makers
            proj = {f"{part}.proj" for part in attention}
            if makers & (heads | within) or any(one.reads and one.layer in proj for one in members):
                left.update(dict.fromkeys(sorted(makers & set(layers)), "classifier" if name in heads else GRAPH))
            else:
                found.append(_group(model, name, members, residual=any(_adds(dep.target) for dep, _ in items)))
    return found, left


def _members(
    graph: Any,
    items: Sequence[Any],
    names: Mapping[Any, str],
    values: Mapping[int, str],
    merging: Mapping[str, int],
) -> Iterator[Member]:
    """The tensors that a group of the graph touches. Raises ValueError where channels have no place of their own."""
    for item in items:
        module, units = item.dep.target.module, len(items[0].idxs)
        if isinstance(module, nn.Parameter):
            yield Member(values[id(module)], item.dep.target.pruning_dim, _index(item.idxs, item.root_idxs, units))
        # Others are operations, or have one slope for all channels.
        elif module in names and not (isinstance(module, nn.PReLU) and module.num_parameters == 1):
            index = _index(item.idxs, item.root_idxs, units)
            reads = isinstance(module, nn.Conv2d | nn.Linear) and (
                graph.is_in_channel_pruning_fn(item.dep.handler)
                and not graph.is_out_channel_pruning_fn(item.dep.handler)
            )
            state = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
            dim, around = int(reads), merging[names[module].rpartition(".")[0]]
            for key in ("weight",) if reads else tuple(key for key, value in state.items() if value.ndim > 0):
                beside = around > 1 and state[key].shape[dim] == around * units
                places = torch.arange(around * units).view(around, units).T if beside else index
                yield Member(f"{names[module]}.{key}", dim, places, reads)


def _index(places: Sequence[int], channels: Sequence[int], units: int) -> Tensor:
    """(units, m): places by the channel that lies there."""
    rows: list[list[int]] = [[] for _ in range(units)]
    for place, channel in zip(places, channels, strict=True):
        rows[channel].append(place)
    if len({len(row) for row in rows}) != 1 or not rows[0] or len(set(places)) != len(places):
        raise ValueError("channels have no place of their own")
    return torch.tensor(rows)


def _adds(node: Any) -> bool:
    """Whether it is where two paths are added; what a parameter is added to is one path."""
    operation = str(getattr(node.module, "_grad_fn", ""))
    paths = [one for one in node.inputs if not isinstance(one.module, nn.Parameter)]
    return "AddBackward" in operation and len(paths) > 1


def _parts(module: nn.Module) -> tuple[str, int]:
    """What the module calls the parts that its channels are taken in, and how many; one where it takes all at once."""
    if isinstance(module, nn.Conv2d):
        return "groups", module.groups
    return "num_groups", module.num_groups if isinstance(module, nn.GroupNorm) else 1


def spans(module: nn.Module) -> bool:
    """Whether it is a norm whose statistics are taken over all channels."""
    return isinstance(module, nn.LayerNorm | nn.GroupNorm) and _parts(module)[1] == 1


def _group(model: nn.Module, name: str, members: Sequence[Member], *, residual: bool) -> Group:
    units, modules = len(members[0].index), {one.layer: model.get_submodule(one.layer) for one in members}
    spanned = any(spans(module) for module in modules.values())
    # One channel in each part; where there are more, `_coupled` makes units of them.
    parts = {one.layer: _parts(modules[one.layer]) for one in members if not one.reads}
    per_unit = {layer: {called: 1} for layer, (called, count) in parts.items() if 1 < count == units}
    return Group(name, "channels", units, 1, tuple(members), not (residual or spanned), per_unit)


def _coupled(model: nn.Module, groups: Sequence[Group], left: dict[str, str]) -> list[Group]:
    """The groups, those on both sides of a convolution with groups as one, whose unit is whole groups of it.

    The same for a norm of groups, whose statistics are then those of a unit.
    """
    found = list(groups)
    for name, module in model.named_modules():
        called, count = _parts(module)
        sides = [one for one in found if any(member.layer == name for member in one.members)]
        if count == 1 or not sides or (len(sides) == 1 and name in sides[0].per_unit):
            continue
        merged = _joined(sides, name, called, count, len(cast(Tensor, module.weight)))
        at = found.index(sides[0])
        found = [one for one in found if one not in sides]
        if merged is None:
            left.update({one.name: GRAPH for one in sides})
        else:
            found.insert(at, merged)
    return found


def _joined(sides: Sequence[Group], layer: str, called: str, count: int, width: int) -> Group | None:
    """One group of those that make and read the channels of a layer with so many parts.

    None where they do not make all its channels.
    """
    made = [one.index for side in sides for one in side.members if one.key == f"{layer}.weight" and not one.reads]
    if sum(index.numel() for index in made) != width:
        return None
    units = math.gcd(count, *(one.units for one in sides))
    members = [
        replace(member, index=member.index.reshape(units, -1))
        for one in sides
        for member in one.members
        # Each part reads its own channels: what it reads need not be cut out of its weight.
        if not (member.layer == layer and member.reads)
    ]
    per_unit: dict[str, dict[str, int]] = {}
    for one in sides:
        for module, shares in one.per_unit.items():
            per_unit[module] = {key: each * one.units // units for key, each in shares.items()}
    per_unit[layer] = {called: count // units}
    first = sides[0]
    unit = first.width // units
    return Group(first.name, "channels", units, unit, tuple(members), all(one.inner for one in sides), per_unit)


def _alone(model: nn.Module, groups: Sequence[Group], left: dict[str, str]) -> list[Group]:
    """The groups whose tensors no layer and no group before them shares; the others go to `left`."""
    layers = {name: dict(module.named_parameters(recurse=False)) for name, module in model.named_modules()}
    uses = Counter(id(value) for values in layers.values() for value in values.values())
    tied = {f"{name}.{key}" for name, values in layers.items() for key, value in values.items() if uses[id(value)] > 1}
    owned: dict[tuple[str, int], set[int]] = {}
    alone = []
    for group in groups:
        places = [((one.key, one.dim), set(one.index.flatten().tolist())) for one in group.members]
        if any(one.key in tied for one in group.members):
            left[group.name] = TIED
        elif any(owned.get(where, set()) & taken for where, taken in places):
            left[group.name] = SHARED
        else:
            alone.append(group)
            for where, taken in places:
                owned.setdefault(where, set()).update(taken)
    return alone
