"""A subnet as a network of its own: narrower layers, fewer blocks, thinner pairs, nothing elastic left."""

from __future__ import annotations

from torch import nn

from slim.artifact import Preprocessing
from slim.passes.elastic.blocks import leave_out
from slim.passes.elastic.ranks import split
from slim.passes.elastic.space import Space, Subnet
from slim.passes.prune.cut import pruned
from slim.passes.prune.groups import positions


def extract(model: nn.Module, space: Space, subnet: Subnet) -> nn.Module:
    """A copy in which nothing is left but `subnet`; what it is fed says `fed`."""
    kept = space.kept(subnet)
    put = split(model, space.factored(subnet))
    smaller = pruned(model, kept)
    put(smaller, positions(model.state_dict(), kept))
    leave_out(smaller, space.skipped(subnet))
    return smaller


def fed(given: Preprocessing, pixels: int) -> Preprocessing:
    """What a subnet is fed whose input has sides of so many pixels; 0 is the input as it is."""
    channels, height, width = given.size
    return given.model_copy(update={"size": (channels, pixels or height, pixels or width)})
