"""What a network costs as a function of the widths of its groups: parts of the network, each read off a few widths.

Parameters and multiply-accumulates are products of what stays in each dimension, and exact. Milliseconds come from
single layers, timed on the target at a few widths of their inputs and outputs, with straight lines between; or from a
model that was fitted to whole networks.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from slim import costs, surgery
from slim.contract import Meter
from slim.goal import Goal
from slim.passes.layers import Calls, calls_of
from slim.passes.prune.groups import Group

if TYPE_CHECKING:
    from slim.passes.elastic.latency import Rates

Layer = nn.Linear | nn.Conv2d

GRID = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Shares of the way from all to the fewest units at which a layer is timed, for its inputs and for its outputs."""


@dataclass(frozen=True)
class Side:
    """One dimension of a tensor, and how much of it goes with the units of groups."""

    size: int
    per_unit: Mapping[int, int]
    """Number of a group -> positions that one of its units takes."""

    def width(self, gone: Sequence[int]) -> int:
        """What stays when so many units of each group are gone."""
        return self.size - sum(each * gone[number] for number, each in self.per_unit.items())


class Part(Protocol):
    """A part of the network whose cost depends on the widths of some groups."""

    @property
    def sides(self) -> tuple[Side, ...]:
        """What its cost depends on."""

    def cost(self, gone: Sequence[int]) -> float:
        """When so many units of each group are gone, in the unit of the goal."""


@dataclass(frozen=True)
class Product:
    """What costs a fixed amount for each element."""

    sides: tuple[Side, ...]
    each: float

    def cost(self, gone: Sequence[int]) -> float:
        """Elements that stay, times what each costs."""
        return self.each * math.prod(side.width(gone) for side in self.sides)


@dataclass(frozen=True, eq=False)
class Timed:
    """A layer that was timed at some widths."""

    sides: tuple[Side, ...]
    widths: tuple[tuple[int, ...], ...]
    """For each side, ascending."""
    values: NDArray[np.float64]
    """ms, one axis for each side."""

    def cost(self, gone: Sequence[int]) -> float:
        """ms, between the nearest timed widths along straight lines."""
        found = self.values
        for side, widths in zip(self.sides, self.widths, strict=True):
            at = float(np.interp(side.width(gone), widths, range(len(widths))))
            low = min(int(at), len(widths) - 1)
            high = min(low + 1, len(widths) - 1)
            found = found[low] * (1 - (at - low)) + found[high] * (at - low)
        return float(found)


@dataclass(frozen=True)
class Prices:
    """The whole network."""

    parts: tuple[Part, ...]
    fixed: float
    """What no group changes."""

    def cost(self, gone: Sequence[int]) -> float:
        """Of the whole when so many units of each group are gone."""
        return self.fixed + sum(part.cost(gone) for part in self.parts)

    def of(self, group: int) -> tuple[Part, ...]:
        """The parts that a group changes."""
        return tuple(part for part in self.parts if any(group in side.per_unit for side in part.sides))


def prices(
    goal: Goal,
    model: nn.Module,
    groups: Sequence[Group],
    fewest: Sequence[int],
    size: tuple[int, int, int],
    meter: Meter | None = None,
) -> Prices:
    """What the network costs in the unit of `goal`.

    Args:
        goal: what is counted or timed.
        model: on the CPU, in eval mode.
        groups: whose widths may change.
        fewest: units that each keeps at least.
        size: (C, H, W) of the network's input.
        meter: times layers where the goal is in milliseconds.
    """
    if goal.timed:
        assert meter is not None  # the caller's: a goal in milliseconds needs a target
        layers = _layers(model, groups)
        units = [group.units for group in groups]
        return _timed(model, layers, calls_of(model, layers, size), fewest, units, meter)
    if goal.metric == "macs":
        return _with_rest(_operations(model, groups, size), costs.count_macs(model, size), groups)
    each = 4 if goal.metric == "size" else 1  # bytes of one parameter in the file
    parts = [Product(found, each) for found in _sides(model, groups).values()]
    return _with_rest(parts, each * costs.count_params(model), groups)


def predicted(rates: Rates, model: nn.Module, groups: Sequence[Group], size: tuple[int, int, int]) -> Prices:
    """Milliseconds by a table of the network: of its operations, and of the widths of groups that the table has.

    The other arguments are those of `prices`.
    """
    parts = [Product(part.sides, rates.mac * part.each) for part in _operations(model, groups, size)]
    parts += [
        Product((Side(group.units, {number: 1}),), rates.widths[group.name] / group.units)
        for number, group in enumerate(groups)
        if group.name in rates.widths
    ]
    return _with_rest([part for part in parts if part.each > 0], rates.whole, groups)


def _operations(model: nn.Module, groups: Sequence[Group], size: tuple[int, int, int]) -> list[Product]:
    """Multiply-accumulates of what the groups change."""
    layers = _layers(model, groups)
    calls = calls_of(model, layers, size)
    parts = [Product(found, _positions(model, name, calls[name])) for name, found in layers.items()]
    for number, group in enumerate(groups):
        if group.kind in ("heads", "dims"):  # queries times keys, and what comes of it times values
            each = sum(2 * windows * tokens**2 for _, (windows, tokens, _) in calls[group.makers[0]])
            parts.append(Product((Side(group.width, {number: group.unit}),), each))
    return parts


def _with_rest(parts: Sequence[Part], whole: float, groups: Sequence[Group]) -> Prices:
    """Prices of a network that costs `whole` as it is."""
    return Prices(tuple(parts), whole - sum(part.cost([0] * len(groups)) for part in parts))


def _layers(model: nn.Module, groups: Sequence[Group]) -> dict[str, tuple[Side, ...]]:
    """Linear layer or convolution that a group changes -> dimensions of its weight."""
    sides = _sides(model, groups)
    return {
        name: sides[f"{name}.weight"]
        for name, module in model.named_modules()
        if isinstance(module, Layer) and f"{name}.weight" in sides
    }


def _sides(model: nn.Module, groups: Sequence[Group]) -> dict[str, tuple[Side, ...]]:
    """State-dict key of a parameter that a group changes -> its dimensions."""
    found: dict[str, dict[int, dict[int, int]]] = {}
    for number, group in enumerate(groups):
        for member in group.members:
            dims = found.setdefault(member.key, {}).setdefault(member.dim, {})
            dims[number] = dims.get(number, 0) + member.index.shape[1]
    state = dict(model.named_parameters())
    return {
        key: tuple(Side(length, dims.get(dim, {})) for dim, length in enumerate(state[key].shape))
        for key, dims in found.items()
        if key in state
    }


def _positions(model: nn.Module, name: str, calls: Calls) -> float:
    """How often the layer's weight is multiplied for one image."""
    layer: Any = model.get_submodule(name)
    return float(sum(math.prod(output) for _, output in calls) / len(layer.weight))


def _timed(
    model: nn.Module,
    layers: Mapping[str, tuple[Side, ...]],
    calls: Mapping[str, Calls],
    fewest: Sequence[int],
    units: Sequence[int],
    meter: Meter,
) -> Prices:
    entries: list[tuple[nn.Module, tuple[int, ...]]] = []
    grids: list[tuple[tuple[Side, ...], tuple[tuple[int, ...], ...]]] = []
    for name, sides in layers.items():
        layer: Any = model.get_submodule(name)
        widths = tuple(_grid(side, fewest, units) for side in sides[:2])
        for shape, _ in calls[name]:
            grids.append((sides[:2], widths))
            entries += [_resized(layer, made, read, shape) for made, read in itertools.product(*widths)]
    timings = iter(meter.table(entries))
    parts = []
    for sides, widths in grids:
        lengths = [len(one) for one in widths]
        values = np.array([next(timings).value for _ in range(math.prod(lengths))]).reshape(lengths)
        parts.append(Timed(sides, widths, values))
    return Prices(tuple(parts), 0.0)


def _grid(side: Side, fewest: Sequence[int], units: Sequence[int]) -> tuple[int, ...]:
    """Widths of a side at which its layer is timed, ascending."""

    def gone(share: float) -> list[int]:
        return [round((1 - share) * (whole - least)) for whole, least in zip(units, fewest, strict=True)]

    return tuple(sorted({side.width(gone(share)) for share in GRID}))


def _resized(layer: Layer, made: int, read: int, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
    """A copy of the layer with so many rows and columns, and the shape of its input without the batch."""
    resized = copy.deepcopy(layer)
    kept = {"weight": {0: range(made), 1: range(read)}}
    if layer.bias is not None:
        kept["bias"] = {0: range(made)}
    if isinstance(resized, nn.Conv2d):
        resized.groups = resized.groups * made // len(resized.weight) if resized.groups > 1 else 1
    surgery.keep(resized, kept)
    if isinstance(resized, nn.Conv2d):
        return resized, (resized.in_channels, *shape[2:])
    return resized, (*((math.prod(shape[:-1]),) if len(shape) > 2 else ()), read)
