"""Cutting channels out of a network, and checking beforehand that nothing but those channels goes with them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from slim import surgery
from slim.passes.prune.groups import Group, attributes, positions, spans

NOT_EQUAL = "cutting its channels out is not the same as setting them to zero"
SINGLE = "it has one unit alone"
SAME = 1e-6
"""Of the largest output: what layers may differ by that compute in fp32 whatever they are given, as some norms do."""
SAME_IN_FP32 = 1e-4
"""The same where the network cannot compute in fp64: each of some hundred layers rounds by 1e-7, and adds up."""


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
        if spans(zeroed.get_submodule(name)):
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
        last = isinstance(self.norm, nn.LayerNorm) and "2d" not in type(self.norm).__name__
        dim = x.ndim - 1 if last else 1
        seen = self.norm(x.index_select(dim, self.places))
        return torch.zeros_like(x).index_copy(dim, self.places, seen)


def trusted(
    model: nn.Module,
    groups: Sequence[Group],
    size: tuple[int, int, int],
    zeroed: Callable[[nn.Module, Sequence[tuple[Group, Sequence[int]]]], nn.Module] = silenced,
) -> tuple[list[Group], dict[str, str]]:
    """The groups whose channels can be cut out, and why the others cannot.

    Some units of each are cut out of a copy and set to zero in another. What both compute is compared in fp64, where
    rounding hides no mistake. Values near zero get noise first, for behind a fresh classifier or layer scale every
    mistake would look exact. A group is believed beside those believed before it.

    Args:
        model: in eval mode, on the CPU.
        groups: of `groups_of`.
        size: (C, H, W) of the network's input.
        zeroed: a copy of a network in which each group has all but the given units at zero.
    """
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, *size, generator=generator)
    loud, tolerance = surgery.audible(model), SAME_IN_FP32
    if _runs(copy.deepcopy(loud).double(), images.double()):
        loud, images, tolerance = loud.double(), images.double(), SAME
    several = [group for group in groups if group.units > 1]
    kept = {group: some_of(group.units, generator) for group in several}

    def holds(some: Sequence[Group]) -> bool:
        left = [(group, kept[group]) for group in some]
        try:
            with torch.no_grad():
                found = pruned(loud, left)(images)
                expected = zeroed(loud, left)(images)
                near = (found - expected).abs().max() <= tolerance * expected.abs().max()
                return found.shape == expected.shape and bool(near)
        except Exception:  # whatever a network can raise whose tensors do not fit
            return False

    def sift(some: Sequence[Group], sure: list[Group]) -> list[Group]:
        """`sure`, and all of them where they hold beside it, else what holds of either half."""
        if not some or holds([*sure, *some]):
            return [*sure, *some]
        if len(some) == 1:
            return sure
        middle = len(some) // 2
        return sift(some[middle:], sift(some[:middle], sure))

    believed = sift(several, [])
    return believed, {group.name: NOT_EQUAL if group.units > 1 else SINGLE for group in groups if group not in believed}


def _runs(model: nn.Module, images: Tensor) -> bool:
    try:
        with torch.no_grad():
            model(images)
    except Exception:  # whatever a network can raise that makes tensors of fp32 itself
        return False
    return True


def some_of(units: int, generator: torch.Generator) -> list[int]:
    """About half of several units, drawn so that no shift takes them to themselves, as it would every other unit."""
    count = next(count for count in range(units // 2, 0, -1) if math.gcd(count, units) == 1)
    return sorted(torch.randperm(units, generator=generator)[:count].tolist())
