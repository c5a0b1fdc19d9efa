"""A subnet as a network of its own: narrower layers, fewer blocks, nothing elastic left."""

from __future__ import annotations

from torch import nn

from slim.passes.elastic.blocks import leave_out
from slim.passes.elastic.space import Space, Subnet
from slim.passes.prune.cut import pruned


def extract(model: nn.Module, space: Space, subnet: Subnet) -> nn.Module:
    """A copy in which nothing is left but `subnet`."""
    smaller = pruned(model, space.kept(subnet))
    leave_out(smaller, space.skipped(subnet))
    return smaller
