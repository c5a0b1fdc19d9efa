"""An elastic network with all that is needed to compare its subnets: images held out, costs, a model of latency."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from pydantic import JsonValue
from torch import nn

from slim import costs, environment
from slim.artifact import Step
from slim.contract import Context, Meter
from slim.data import Data
from slim.errors import StoreError
from slim.goal import Goal
from slim.passes.elastic import search
from slim.passes.elastic.archive import Front, Point
from slim.passes.elastic.blockwise import Blockwise
from slim.passes.elastic.elastic import Elastic
from slim.passes.elastic.examine import Examiner, Repair
from slim.passes.elastic.extract import extract
from slim.passes.elastic.latency import LatencyModel, build
from slim.passes.elastic.predictor import Predictor, measure_singles
from slim.passes.elastic.space import Space, Subnet
from slim.passes.elastic.subnets import as_json
from slim.passes.elastic.table import Origin, Row
from slim.passes.elastic.terms import Terms
from slim.passes.prune.choose import build_of
from slim.passes.reach import meter_of

BYTES = 4
"""Of one parameter in the exported file."""


@dataclass(frozen=True, eq=False)
class Family:
    """An elastic network, and what is needed to compare its subnets."""

    model: nn.Module
    space: Space
    context: Context
    examiner: Examiner
    digest: str
    """Of the elastic artifact."""
    seed: int
    """With which images were held out."""

    @classmethod
    def of(cls, model: nn.Module, context: Context, how: Repair) -> Family:
        """The family that `model` is the largest of.

        Raises:
            PassError: the structure was changed since it was made elastic.
        """
        assert context.backbone is not None  # Pass.__call__ set it
        elastic, step = elastic_of(context)
        space = elastic.space_of(model, context.backbone.input.size, step.plan)
        held = replace(context, data=apart(context, step))
        digest = context.history[-1].digests["output"]
        return cls(model, space, context, Examiner.of(model, space, held, how), digest, step.seed)

    @property
    def data_id(self) -> str:
        """Fingerprint of the data."""
        assert self.context.data is not None  # Pipeline.check saw to it
        return self.context.data.id

    @cached_property
    def counted(self) -> Blockwise:
        """Parameters and multiply-accumulates."""
        assert self.context.backbone is not None  # Pass.__call__ set it
        size = self.context.backbone.input.size
        return Blockwise(self.space, lambda one: costs.count(extract(self.model, self.space, one), size))

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

    def measured(
        self, meter: Meter, rows_done: Iterable[Row] = (), keep: Callable[[Row], None] = lambda row: None
    ) -> LatencyModel:
        """A model of latency, of whole subnets measured on the target; those in `rows_done` are not measured again."""
        return build(
            self.terms,
            lambda one: meter.latency(extract(self.model, self.space, one)),
            self.origin(meter),
            seed=self.context.seed,
            rows_done=rows_done,
            keep=keep,
            progress=self.context.progress,
        )

    @cached_property
    def terms(self) -> Terms:
        """What latency is made of; widths and blocks of one build share a term."""
        macs, largest = self.counted.of("macs"), self.space.largest

        def without(place: int) -> str:
            on = (*largest.on[:place], False, *largest.on[place + 1 :])
            return f"{macs(Subnet(largest.units, on)):.0f}"

        def narrow(place: int) -> str:
            fewest = self.space.dims[place].choices[-1]
            return f"{macs(Subnet((*largest.units[:place], fewest, *largest.units[place + 1 :]), largest.on)):.0f}"

        builds = {
            dim.group.name: f"{build_of(self.model, dim.group)} {dim.choices} {narrow(place)}"
            for place, dim in enumerate(self.space.dims)
        }
        kinds = {block.name: type(self.model.get_submodule(block.name)).__name__ for block in self.space.blocks}
        builds |= {block.name: f"{kinds[block.name]} {without(n)}" for n, block in enumerate(self.space.blocks)}
        return Terms(self.space, macs, builds)

    def search(
        self,
        cost: Callable[[Subnet], float],
        limits: Sequence[float],
        *,
        study: str,
        storage: str | None,
        evaluations: int,
        proposals: int,
    ) -> Front:
        """Subnets evaluated under each of the limits; see search.py."""
        progress = self.context.progress
        singles = measure_singles(self.space, self.examiner.accuracy, progress=progress)
        front = search.search(
            self.space,
            self.examiner.accuracy,
            cost,
            Predictor.of(self.space, singles),
            seed=self.context.seed,
            study=study,
            storage=storage,
            known=singles,
            limits=limits,
            evaluations=evaluations,
            proposals=proposals,
            progress=progress,
        )
        tau = "none" if front.tau is None else f"{front.tau:.2f}"
        self.context.log.info(
            "subnet: %d evaluated of %d proposed; the predictor's tau is %s", front.evaluations, front.proposals, tau
        )
        return front


def elastic_of(context: Context) -> tuple[Elastic, Step]:
    """The step that made the network elastic."""
    step = next(step for step in reversed(context.history) if step.name == Elastic.name)  # the trait says there is one
    return Elastic(**cast(Any, step.config)), step


def as_figures(front: Front) -> dict[str, JsonValue]:
    """A front as plain JSON: the points that nothing beats, and how good the predictions were."""

    def one(point: Point) -> dict[str, JsonValue]:
        return {"cost": round(point.cost, 6), "top1": round(point.accuracy, 4), **as_json(point.subnet)}

    return {
        "evaluations": front.evaluations,
        "proposals": front.proposals,
        "tau": front.tau,
        "front": [one(point) for point in front.optimal],
    }


def read_table(path: str) -> dict[str, Any]:
    """A table's JSON.

    Raises:
        StoreError: there is no such file, or it is not JSON.
    """
    place = Path(path).expanduser()
    try:
        found: dict[str, Any] = json.loads(place.read_text())
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: no latency table ({error}); make it by slim table build") from error
    return found


def apart(context: Context, step: Step) -> Data:
    """The data with the images held out that the elastic step held out."""
    assert context.data is not None  # Pipeline.check saw to it
    return context.data.apart(cast(int, step.config["held_out"]), step.seed)
