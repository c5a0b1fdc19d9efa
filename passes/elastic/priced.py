"""What the subnets of an elastic network cost: counted, or predicted from whole subnets measured. Needs no images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

from pydantic import JsonValue
from torch import nn

from slim import costs, environment, store
from slim.artifact import Step
from slim.contract import Context, Fed, Meter
from slim.errors import PassError
from slim.goal import Goal
from slim.measurement import Measurement
from slim.passes.elastic.blockwise import Blockwise
from slim.passes.elastic.elastic import Elastic
from slim.passes.elastic.extract import extract, fed
from slim.passes.elastic.latency import LatencyModel, build
from slim.passes.elastic.space import Space, Subnet
from slim.passes.elastic.table import Origin, Row, as_table, is_finished, read_table, rows_of
from slim.passes.elastic.terms import Terms
from slim.passes.prune.choose import build_of
from slim.passes.reach import meter_of

BYTES = 4
"""Of one parameter in the exported file."""


@dataclass(frozen=True, eq=False)
class Priced:
    """An elastic network whose subnets have a cost."""

    model: nn.Module
    space: Space
    context: Context

    @classmethod
    def of(cls, model: nn.Module, context: Context, **fields: Any) -> Self:
        """That of a network and the history it comes with.

        Raises:
            PassError: the structure, or what it is fed, was changed since it was made elastic.
        """
        assert context.backbone is not None  # Pass.__call__ set it
        elastic, step = elastic_of(context)
        space = elastic.space_of(model, context.backbone.input.size, step.plan)
        _, height, width = context.backbone.input.size
        if len(space.pixels) > 1 and not height == width > space.pixels[1]:
            raise PassError(
                f"subnet: the network was made elastic at another input: {space.pixels[1]} pixels are no smaller side "
                f"of {height}x{width}; give it that input again, or make it elastic at this one"
            )
        return cls(model, space, context, **fields)

    @cached_property
    def digest(self) -> str:
        """Of the elastic network and its input."""
        assert self.context.backbone is not None  # Pass.__call__ set it
        known = self.context.history[-1].digests["output"] + self.context.backbone.input.model_dump_json()
        return hashlib.sha256(known.encode()).hexdigest()

    @cached_property
    def counted(self) -> Blockwise:
        """Parameters and multiply-accumulates."""

        def count(subnet: Subnet) -> dict[str, int]:
            made = self.cut_out(subnet)
            return costs.count(made.model, made.input.size)

        return Blockwise(self.space, count)

    def cut_out(self, subnet: Subnet) -> Fed:
        """A subnet, with the values that it has of the largest, and what it is fed."""
        assert self.context.backbone is not None  # Pass.__call__ set it
        return Fed(extract(self.model, self.space, subnet), fed(self.context.backbone.input, subnet.pixels))

    def costs(self, goal: Goal, table: str | None) -> tuple[Callable[[Subnet], float], dict[str, JsonValue]]:
        """What a subnet costs in the unit of `goal`, and what there is to say of a prediction."""
        if goal.timed:
            model = self.latency_model(goal, table)
            self.context.log.info("subnet: latency %s", model)
            return model.predict, {"latency": str(model), "target": model.origin.target}
        if goal.metric == "size":
            params = self.counted.of("params")
            return lambda one: BYTES * params(one), {}
        return self.counted.of(goal.metric), {}

    def latency_model(self, goal: Goal, table: str | None) -> LatencyModel:
        """Of the table, or of what is measured now."""
        meter = meter_of(goal, self.context, "subnet")
        if table is not None:
            return LatencyModel.from_json(read_table(table), self.terms, self.origin(meter))
        return self.measured(meter)

    def origin(self, meter: Meter) -> Origin:
        """What latencies measured here are of."""
        return Origin(environment.fingerprint(), meter.target, self.digest)

    def tabled(self, meter: Meter, place: Path, *, again: bool = False) -> LatencyModel:
        """The model of the table in a file: what it lacks is measured, and each row is written when it is there.

        With `again`, nothing that is there counts.

        Raises:
            StoreError: the table is of another device, target or network.
        """
        origin, rows = self.origin(meter), list[Row]()
        if place.exists() and not again:
            there = read_table(str(place))
            if is_finished(there):
                return LatencyModel.from_json(there, self.terms, origin)
            rows = rows_of(there, origin)

        def keep(row: Row) -> None:
            rows.append(row)
            store.write_text(place, json.dumps(as_table(origin, rows)) + "\n")

        model = self.measured(meter, tuple(rows), keep)
        store.write_text(place, json.dumps(model.as_json()) + "\n")
        return model

    def measured(
        self, meter: Meter, rows_done: Iterable[Row] = (), keep: Callable[[Row], None] = lambda row: None
    ) -> LatencyModel:
        """A model of latency, of whole subnets measured on the target; those in `rows_done` are not measured again.

        Each is measured beside the largest: a machine that is busy for a while is so for both.
        """
        done = [*rows_done]
        largest = self.cut_out(self.space.largest)
        known = next((row.ms for row in done if row.subnet == self.space.largest), None)
        ms = meter.latency(largest).value if known is None else known

        def in_ms(ratio: Measurement) -> Measurement:
            assert ratio.low is not None  # timings are sampled, so they have an interval
            assert ratio.high is not None
            ends = {"low": ms * ratio.low, "high": ms * ratio.high}
            return Measurement(metric="latency_p50_ms", value=ms * ratio.value, unit="ms", **ends)

        def measure(some: Sequence[Subnet]) -> list[Measurement]:
            return [in_ms(ratio) for ratio in meter.beside([self.cut_out(one) for one in some], largest)]

        return build(
            self.terms,
            measure,
            self.origin(meter),
            seed=self.context.seed,
            rows_done=done,
            keep=keep,
            progress=self.context.progress,
        )

    @cached_property
    def terms(self) -> Terms:
        """What latency is made of; widths, blocks and ranks of one build share a term."""
        macs, largest = self.counted.of("macs"), self.space.largest

        def without(place: int) -> str:
            on = (*largest.on[:place], False, *largest.on[place + 1 :])
            return f"{macs(replace(largest, on=on)):.0f}"

        def narrow(place: int) -> str:
            units = (*largest.units[:place], self.space.dims[place].choices[-1], *largest.units[place + 1 :])
            return f"{macs(replace(largest, units=units)):.0f}"

        def thin(place: int) -> str:
            ranks = (*largest.ranks[:place], self.space.ranks[place].choices[-1], *largest.ranks[place + 1 :])
            return f"{macs(replace(largest, ranks=ranks)):.0f}"

        builds = {
            dim.group.name: f"{build_of(self.model, dim.group)} {dim.choices} {narrow(place)}"
            for place, dim in enumerate(self.space.dims)
        }
        kinds = {block.name: type(self.model.get_submodule(block.name)).__name__ for block in self.space.blocks}
        builds |= {block.name: f"{kinds[block.name]} {without(n)}" for n, block in enumerate(self.space.blocks)}
        builds |= {
            rank.layer: f"{rank.rows} x {rank.columns} {rank.choices} {thin(n)}"
            for n, rank in enumerate(self.space.ranks)
        }
        return Terms(self.space, macs, builds)


def elastic_of(context: Context) -> tuple[Elastic, Step]:
    """The step that made the network elastic."""
    step = next(step for step in reversed(context.history) if step.name == Elastic.name)  # the trait says there is one
    return Elastic(**cast(Any, step.config)), step
