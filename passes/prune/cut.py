"""Cutting channels out of a network, and checking beforehand that nothing but those channels goes with them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from slim import surgery
from slim.passes.prune.groups import Group, attributes, positions

NOT_EQUAL = "cutting its channels out is not the same as setting them to zero"
Spanning = nn.LayerNorm | nn.GroupNorm
"""Norms whose statistics are taken over channels."""


def cut(model: nn.Module, stays: surgery.Positions, says: Mapping[str, Mapping[str, float]]) -> None:
    """Leave of every tensor what `stays`, and set what modules say of themselves, in place.

    Where an attention's scale changes with the width of its heads, its queries are scaled the other way: fused kernels
    take the scale from the width, whatever the module says.
    """
    for name, values in says.items():
        module = cast(Any, model.get_submodule(name))
        if "scale" in values:
            with torch.no_grad():
                for value in module.qkv.parameters():
                    value[: len(value) // 3] *= module.scale / values["scale"]
        for attribute, value in values.items():
            setattr(module, attribute, value)
    surgery.keep(model, stays)


def pruned(model: nn.Module, kept: Sequence[tuple[Group, Sequence[int]]]) -> nn.Module:
    """A copy in which each group has the given units."""
    smaller = copy.deepcopy(model)
    cut(smaller, positions(model.state_dict(), kept), attributes([(group, len(units)) for group, units in kept]))
    return smaller


def silenced(model: nn.Module, kept: Sequence[tuple[Group, Sequence[int]]]) -> nn.Module:
    """A copy in which each group has all but the given units at zero.

    Norms that take statistics over the channels take them over those that are kept.
    """
    zeroed = copy.deepcopy(model)
    stays = positions(model.state_dict(), kept)
    with torch.no_grad():
        parameters = dict(zeroed.named_parameters())
        for key, dims in stays.items():
            if key not in parameters:
                continue  # running statistics: with weight and bias at zero they do not matter
            for dim, places in dims.items():
                gone = torch.ones(parameters[key].shape[dim], dtype=torch.bool)
                gone[places] = False
                parameters[key].index_fill_(dim, gone.nonzero()[:, 0], 0.0)
    for name in dict.fromkeys(key.rpartition(".")[0] for key in stays):
        if isinstance(zeroed.get_submodule(name), Spanning):
            surgery.swap(zeroed, name, _Over(zeroed.get_submodule(name), stays[f"{name}.weight"][0]))
    return zeroed


class _Over(nn.Module):
    """A norm that sees some channels alone; the others are zero behind it."""

    def __init__(self, norm: nn.Module, places: Sequence[int]) -> None:
        super().__init__()
        self.norm, self.places = copy.deepcopy(norm), torch.tensor(places)
        kept = {name: {0: list(places)} for name, _ in norm.named_parameters(recurse=False)}
        surgery.keep(self.norm, kept)

    def forward(self, x: Tensor) -> Tensor:
        # Channels lie last for a norm of tokens, and second where it is one of maps.
        last = isinstance(self.norm, nn.LayerNorm) and not type(self.norm).__name__.startswith("LayerNorm2d")
        dim = x.ndim - 1 if last else 1
        seen = self.norm(x.index_select(dim, self.places))
        return torch.zeros_like(x).index_copy(dim, self.places, seen)


def trusted(
    model: nn.Module, groups: Sequence[Group], size: tuple[int, int, int]
) -> tuple[list[Group], dict[str, str]]:
    """The groups whose channels can be cut out, and why the others cannot.

    Every other unit is cut out of a copy and set to zero in another. Values near zero get noise first, for behind a
    fresh classifier or layer scale every mistake would look exact.

    Args:
        model: in eval mode, on the CPU.
        groups: of `groups_of`.
        size: (C, H, W) of the network's input.
    """
    loud = surgery.audible(model)
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))

    def holds(some: Sequence[Group]) -> bool:
        kept = [(group, range(0, group.units, 2)) for group in some]
        try:
            with torch.no_grad():
                found = pruned(loud, kept)(images)
                expected = silenced(loud, kept)(images)
        except Exception:  # whatever a network can raise whose tensors do not fit
            return False
        return found.shape == expected.shape and surgery.close(found, expected)

    def sift(some: Sequence[Group]) -> list[Group]:
        """All of them where they hold, else what holds of either half."""
        if not some or holds(some):
            return list(some)
        if len(some) == 1:
            return []
        middle = len(some) // 2
        return sift(some[:middle]) + sift(some[middle:])

    kept = sift([group for group in groups if group.units > 1])
    return kept, {group.name: NOT_EQUAL for group in groups if group.units > 1 and group not in kept}
