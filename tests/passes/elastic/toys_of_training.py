"""Steps of training on small networks, whatever is drawn."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from slim.artifact import Backbone, Preprocessing
from slim.passes.elastic.blocks import Block
from slim.passes.elastic.gates import gated
from slim.passes.elastic.objective import Branches, Sandwich
from slim.passes.elastic.space import Dim, Space
from slim.passes.prune.groups import groups_of

SIZE = (3, 32, 32)
VIT = Backbone(
    name="vit_tiny_patch16_224",
    kwargs={"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 32, "num_heads": 2},
    num_classes=10,
    input=Preprocessing(size=SIZE, crop=1.0),
)


def space_of(model: nn.Module) -> Space:
    """Half of every inner width and two of three blocks may go; the last units are the most important."""
    groups, _ = groups_of(model.eval(), (3, 32, 32))
    inner = [group for group in groups if group.inner]
    dims = [Dim(group, (group.units, group.units // 2), tuple(reversed(range(group.units)))) for group in inner]
    return Space(tuple(dims), tuple(Block(f"blocks.{i}", 0) for i in range(3)), (1,), {})


@contextmanager
def sandwiched(model: nn.Module, **fields: Any) -> Iterator[tuple[Sandwich, Space]]:
    """A sandwich of the largest and the smallest, with the gates on."""
    space = space_of(model)
    settings: dict[str, Any] = {"ramp": 0.0, "divergence": "kl", "temperature": 1.0, "label_weight": 1.0}
    with gated(model, space) as choose:
        draw = fields.pop("draw", lambda _: [space.smallest])
        yield Sandwich(choose, draw, space.largest, **settings | fields), space


@contextmanager
def branched(model: nn.Module, **fields: Any) -> Iterator[tuple[Branches, Space]]:
    """POA's three branches, with the gates on."""
    original = copy.deepcopy(model)
    settings: dict[str, Any] = {"intact": 0.8, "momentum": 0.9, "temperature": 1.0}
    space = space_of(model)
    with gated(model, space) as choose:
        draw = fields.pop("draw", lambda _: [space.smallest])
        yield Branches(choose, draw, space.largest, student=model, original=original, **settings | fields), space
