"""A network that computes as any of its subnets, for training and for checks; nothing of it is saved.

Nothing is sliced or permuted: what a width does not keep is set to zero where it is read, a block that is not there
passes its input on, what a layer of lower rank puts out is projected, and images are made smaller before the network
sees them. With everything open no gate does anything, so that the network is bit for bit what it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slim.passes.elastic.ranks import Projection
from slim.passes.elastic.space import Space, Subnet
from slim.passes.low_rank.schemes import Layer
from slim.passes.prune.groups import Group


@contextmanager
def gated(model: nn.Module, space: Space) -> Iterator[Callable[[Subnet], None]]:
    """Gates on `model`; yields `choose(subnet)`. It begins with the largest, and ends without gates."""
    gates = [_Gate() for _ in space.dims]
    skips = [_Skip(model.get_submodule(block.name)) for block in space.blocks]
    ranks = [Projection(cast(Layer, model.get_submodule(rank.layer))) for rank in space.ranks]
    side = _Side()

    def choose(subnet: Subnet) -> None:
        one = space.canonical(subnet)
        for gate, dim, count in zip(gates, space.dims, one.units, strict=True):
            gate.kept = None if count == dim.group.units else dim.order[:count]
        for skip, on in zip(skips, one.on, strict=True):
            skip.off = not on
        for projection, rank in zip(ranks, one.ranks, strict=True):
            projection.choose(rank)
        side.pixels = one.pixels

    with ExitStack() as attached:
        for gate, dim in zip(gates, space.dims, strict=True):
            for hook in _attach(model, dim.group, gate):
                attached.enter_context(hook)
        for skip in skips:
            attached.enter_context(skip)
        for projection in ranks:
            attached.enter_context(projection.layer.register_forward_hook(projection.after))
        attached.enter_context(model.register_forward_pre_hook(side.before))
        yield choose


def closed(model: nn.Module, kept: Sequence[tuple[Group, Sequence[int]]]) -> nn.Module:
    """A copy in which each group has gates before what reads it, open for the given units alone."""
    copied = copy.deepcopy(model)
    for group, units in kept:
        gate = _Gate()
        gate.kept = tuple(units)
        _attach(copied, group, gate)
    return copied


def _attach(model: nn.Module, group: Group, gate: _Gate) -> list[RemovableHandle]:
    """Put a gate before every layer that reads the group."""
    reading = [member for member in group.members if member.reads]
    return [
        model.get_submodule(member.layer).register_forward_pre_hook(gate.before(member.index)) for member in reading
    ]


class _Gate:
    """One width: which of its units are open; none: all of them."""

    def __init__(self) -> None:
        self.kept: tuple[int, ...] | None = None

    def before(self, index: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
        """What stands before a layer that reads the units at the positions `index` (units, m)."""
        masks: dict[tuple[object, ...], Tensor] = {}

        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self.kept is None:
                return None
            x, *rest = inputs
            dim = 1 if isinstance(layer, nn.Conv2d) else x.ndim - 1
            key = (self.kept, x.device, x.dtype)
            if key not in masks:
                mask = torch.ones(x.shape[dim])
                mask[index.flatten()] = 0
                mask[index[[*self.kept]].flatten()] = 1
                masks[key] = mask.to(x.device, x.dtype)
            return (x * masks[key].view(-1, *[1] * (x.ndim - 1 - dim)), *rest)

        return hook


class _Side:
    """The input: how large images are made."""

    def __init__(self) -> None:
        self.pixels = 0
        """0: as they are."""

    def before(self, model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A forward pre-hook of the network."""
        return (resized(inputs[0], self.pixels), *inputs[1:]) if self.pixels else None


def resized(images: Tensor, pixels: int) -> Tensor:
    """Images (B, C, H, W) with both sides `pixels`, smoothed first, as image libraries do."""
    return F.interpolate(images, (pixels, pixels), mode="bilinear", antialias=True, align_corners=False)


class _Skip:
    """One block: whether it passes its input on."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.off = block, False

    def __enter__(self) -> None:
        computes = self.block.forward

        def forward(x: Tensor, *others: Any, **named: Any) -> Any:
            return x if self.off else computes(x, *others, **named)

        self.block.forward = forward

    def __exit__(self, *_: object) -> None:
        del self.block.forward  # the class's own shows again
