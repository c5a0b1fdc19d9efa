"""Latency of a network that is not elastic: a model of narrower and thinner copies of it, measured as whole networks.

The copies are what it could be cut to if its widths and ranks were elastic. Of each width some units stay, it does not
matter which, for latency does not depend on values: a table serves the network after any training.
"""

from __future__ import annotations

import hashlib
import json
import math
from functools import cached_property
from typing import Any, Self

from torch import nn

from slim import environment
from slim.artifact import Backbone
from slim.contract import Context
from slim.errors import PassError
from slim.goal import Goal
from slim.passes.elastic.discover import Wanted, discover
from slim.passes.elastic.latency import Rates
from slim.passes.elastic.priced import Priced
from slim.passes.elastic.space import Dim, Space
from slim.passes.elastic.table import Origin, read_table
from slim.passes.elastic.terms import FEWEST
from slim.passes.reach import meter_of

SHARES = (1.0, 0.75, 0.5, 0.25)
WANTED = Wanted(
    widths=SHARES, depth=1.0, heads="whole", align=8, floor=8, skip=(), ranks=SHARES, min_width=64, pixels=()
)
"""What is made smaller in the networks that are measured."""


class Dense(Priced):
    """A network that is not elastic, and the smaller ones that are measured for its table."""

    @classmethod
    def of(cls, model: nn.Module, context: Context, **fields: Any) -> Self:
        """That of a network.

        Raises:
            PassError: hardly anything of it can be narrower or thinner.
        """
        assert context.backbone is not None  # the callers set it
        found = discover(model, context.backbone.input.size, WANTED)
        dims = tuple(
            Dim(group, choices, tuple(range(group.units)))
            for group, choices in zip(found.groups, found.choices, strict=True)
        )
        space = Space(dims, (), (), found.left, tuple(found.ranks))
        if math.prod(map(len, space.axes)) < FEWEST:
            raise PassError(
                f"latency table: {len(dims)} widths and {len(found.ranks)} ranks of {context.backbone.name!r} can be "
                "smaller, too few for a model of latency; give passes no table, and they time layers alone"
            )
        return cls(model, space, context, **fields)

    @cached_property
    def digest(self) -> str:
        """Of the structure and its input."""
        assert self.context.backbone is not None  # `of` set it
        return structure(self.model, self.context.backbone)


def structure(model: nn.Module, backbone: Backbone) -> str:
    """Digest of a network whatever its values: what it was built as, what it is fed, and the shapes it has now."""
    shapes = sorted((key, str(value.dtype), [*value.shape]) for key, value in model.state_dict().items())
    known = [backbone.name, backbone.kwargs, backbone.input.model_dump(mode="json"), shapes]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def rates(table: str, model: nn.Module, goal: Goal, context: Context, name: str) -> Rates:
    """What the table in a file says of a network; `name` of the pass, for errors.

    Raises:
        PassError: there is no target.
        StoreError: there is no such table, it is not finished, or of another device, target or network.
    """
    assert context.backbone is not None  # Pass.__call__ set it
    target = meter_of(goal, context, name).target
    origin = Origin(environment.fingerprint(), target, structure(model, context.backbone))
    return Rates.from_json(read_table(table), origin)
