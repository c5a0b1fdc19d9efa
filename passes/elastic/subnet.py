"""Subnet: the best network of a trained family under a budget, cut out of it.

Which one is searched for, by what single changes cost and then by real evaluation, as for once-for-all networks (Cai
et al. 2020, arXiv:1908.09791); what it costs in milliseconds is predicted from whole networks measured on the target,
and measured again before it is believed. Trains nothing: `distill` behind it polishes what was cut out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

from pydantic import Field, JsonValue, field_validator
from torch import nn

from slim import surgery
from slim.artifact import Preprocessing
from slim.contract import Context, Pass, Plan, Role
from slim.distributed import is_main
from slim.errors import PassError
from slim.goal import parse_goal
from slim.passes.elastic import search, table
from slim.passes.elastic.archive import Front
from slim.passes.elastic.blocks import leave_out
from slim.passes.elastic.examine import Images, Repair, mend
from slim.passes.elastic.extract import fed
from slim.passes.elastic.family import Family, apart, as_figures
from slim.passes.elastic.priced import elastic_of
from slim.passes.elastic.ranks import split
from slim.passes.elastic.space import Space, Subnet
from slim.passes.elastic.subnets import as_json
from slim.passes.prune.choose import apply, outputs_kept, ranges, stays_of
from slim.passes.prune.groups import attributes, positions
from slim.passes.reach import Unreachable, Words, cost_of, reach


class BestSubnet(Pass):
    """Cut the best subnet under a budget out of an elastic network."""

    name: ClassVar[str] = "subnet"
    version: ClassVar[int] = 2
    role: ClassVar[Role] = "structure"
    needs: ClassVar[frozenset[str]] = frozenset({"supernet", "float"})
    gives: ClassVar[frozenset[str]] = frozenset({"dense"})
    drops: ClassVar[frozenset[str]] = frozenset({"supernet"})
    shrinks: ClassVar[frozenset[str]] = frozenset({"params", "macs"})

    to: str
    """Budget, as a share kept or absolutely: `0.5x-latency`, `4ms`, `300M-macs`, `0.5x-params`."""
    evaluations: int = Field(default=search.EVALUATIONS, ge=1)
    """Subnets that are really evaluated, on the training images held out."""
    proposals: int = Field(default=search.PROPOSALS, ge=1)
    """Subnets proposed and ranked by prediction for each evaluation."""
    repair: Repair = "norms"
    """What is done in closed form to every subnet before it is evaluated, and to the one that ships: batch norms
    re-estimated, layers that lost inputs refitted by least squares (`outputs`), or `both`."""
    storage: str | None = None
    """URL of a database, as `sqlite:///search.db`, through which processes, machines and budgets share what a search
    finds; none keeps it to this run."""
    table: str | None = None
    """Latency table of `slim table build`; none measures one where the budget is in milliseconds."""

    @field_validator("to")
    @classmethod
    def _a_goal(cls, value: str) -> str:
        return str(parse_goal(value))

    @property
    def reads(self) -> frozenset[str]:
        """Training images, on which subnets are compared."""
        return frozenset({"train"})

    @property
    def measures(self) -> bool:
        """Whether the budget is one of the exported file."""
        return parse_goal(self.to).measured

    def sources(self, context: Context) -> dict[str, str]:
        """The table's content."""
        return {} if self.table is None else table.sources(self.table)

    @classmethod
    def migrate(cls, version: int, config: dict[str, Any], plan: Plan) -> tuple[dict[str, Any], Plan] | None:
        """Version 1 cut widths and blocks alone."""
        return (config, {**plan, "ranks": {}, "pixels": 0}) if version == 1 else None

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """What stays of every tensor, and which blocks are not there."""
        family = Family.of(model, context, repair=self.repair)
        goal = parse_goal(self.to)
        before = cost_of(goal, context.fed(model), context, self.name)
        if before <= goal.limit_of(before):
            raise PassError(f"subnet: --to {self.to}: the whole network meets it; ask for less")
        cost, said = family.costs(goal, self.table)
        front = family.search(
            cost, [goal], storage=self.storage, evaluations=self.evaluations, proposals=self.proposals
        )
        words = Words(self.name, "subnets", "make more elastic: smaller widths, less depth")
        chosen, figures = reach(
            goal,
            Found(front, cost, family.space),
            context.fed(model),
            family.cut_out,
            context,
            words,
        )
        assert context.backbone is not None  # Pass.__call__ set it
        context.memo["backbone"] = context.backbone
        return {
            **plan_of(model, family.space, chosen),
            "subnet": as_json(chosen),
            "budget": figures,
            "search": {**as_figures(front), **said},
        }

    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Narrower layers, thinner pairs and fewer blocks, with the values of what stays."""
        put = split(model, cast(dict[str, int], plan["ranks"]))
        apply(model, plan)
        put(model, stays_of(plan))
        leave_out(model, cast(list[str], plan["skipped"]))
        return model

    def feeds(self, given: Preprocessing, plan: Plan) -> Preprocessing:
        """Smaller images, where the subnet takes them."""
        return fed(given, cast(int, plan["pixels"]))

    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> dict[str, JsonValue] | None:
        """Repair in closed form; rank 0's values go to every process."""
        if not is_main():
            return None
        groups = cast(Any, context.plan["groups"])
        kept = outputs_kept(context.plan)
        readers = [name for group in groups.values() for name in group["layers"]["reads"]]
        _, trained = elastic_of(context)
        # As before the pass: the largest sees images of its own size.
        before = replace(context, data=apart(context, trained), backbone=context.memo["backbone"])
        images = Images.of(teacher, before).train
        pairs, pixels = [*cast(dict[str, int], context.plan["ranks"])], cast(int, context.plan["pixels"])
        with surgery.on_device(context.device, model, teacher):
            return mend(model, teacher, kept, readers, pairs, images, pixels, self.repair)


@dataclass(frozen=True, eq=False)
class Found:
    """What `reach` may choose from."""

    front: Front
    predicted: Callable[[Subnet], float]
    space: Space

    @property
    def dense(self) -> float:
        """Cost of the whole network."""
        return self.predicted(self.space.largest)

    @property
    def cheapest(self) -> Subnet:
        """The cheapest that was evaluated, or the smallest, which is not where it costs too much already."""
        return min(self.front.points[0].subnet, self.space.canonical(self.space.smallest), key=self.predicted)

    def within(self, budget: float) -> Subnet:
        """The most accurate within `budget`."""
        try:
            return self.front.best_within(budget).subnet
        except Unreachable:
            raise Unreachable(self.predicted(self.cheapest)) from None

    def cost(self, choice: Subnet) -> float:
        """As predicted, or counted."""
        return self.predicted(choice)

    def step_below(self, choice: Subnet) -> float:
        """What the next cheaper one that was evaluated saves."""
        here = self.predicted(choice)
        return here - max((point.cost for point in self.front.points if point.cost < here), default=here)


def plan_of(model: nn.Module, space: Space, chosen: Subnet) -> Plan:
    """What is cut out, in the form of prune's plans; blocks that go, layers that become two, the input's side."""
    kept = space.kept(chosen)
    stays = positions(model.state_dict(), kept)
    return {
        "groups": {
            group.name: {
                "kind": group.kind,
                "width": group.width,
                "kept": len(units) * group.unit,
                "unit": group.unit,
                "units": ranges(units),
                "layers": {"makes": [*group.makers], "reads": [*group.readers]},
            }
            for group, units in kept
        },
        "keep": {key: {str(dim): ranges(some) for dim, some in dims.items()} for key, dims in stays.items()},
        "attributes": cast(JsonValue, attributes([(group, len(units)) for group, units in kept])),
        "skipped": [*space.skipped(chosen)],
        "ranks": {**space.factored(chosen)},
        "pixels": chosen.pixels,
    }
