"""An elastic network with all that is needed to compare its subnets: images held out, costs, a model of latency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

from pydantic import JsonValue

from slim import environment
from slim.artifact import Step
from slim.contract import Context
from slim.data import Data
from slim.goal import Goal
from slim.passes.elastic import search
from slim.passes.elastic.archive import Front
from slim.passes.elastic.examine import Examiner, Repair
from slim.passes.elastic.predictor import Predictor, measure_singles
from slim.passes.elastic.priced import Priced, elastic_of
from slim.passes.elastic.space import Subnet
from slim.passes.elastic.trials import Trials
from slim.passes.reach import meter_of


@dataclass(frozen=True, eq=False)
class Family(Priced):
    """An elastic network whose subnets have a cost and an accuracy."""

    repair: Repair
    """What is done to a subnet before it is evaluated."""

    @cached_property
    def data(self) -> Data:
        """With the images in a split `held` that the elastic step held out."""
        step = elastic_of(self.context)[1]
        found = apart(self.context, step)
        if found.membership("held") != step.plan["held"]:
            self.context.log.warning(
                "subnet: these are not the images that elastic held out, so it may have trained on some of them, and"
                " accuracies flatter; give the --data, --split and --limit-train of its run"
            )
        return found

    @cached_property
    def examiner(self) -> Examiner:
        """What subnets are evaluated with."""
        return Examiner.of(self.model, self.space, replace(self.context, data=self.data), self.repair)

    def accuracy(self, subnet: Subnet) -> float:
        """Top-1 in percent on the images held out."""
        return self.examiner.accuracy(subnet)

    @property
    def study(self) -> str:
        """Name of all that accuracy depends on."""
        images = f"{self.data.id[:21]} {self.data.membership('train', 'held')[:16]}"
        return f"{self.digest[:16]} {images} repair {self.repair}"

    def aim(self, goal: Goal) -> str:
        """What an evaluation under this goal was made for; milliseconds are those of one target and device."""
        if not goal.timed:
            return str(goal)
        return f"{goal} on {meter_of(goal, self.context, 'subnet').target} of {environment.fingerprint()}"

    def search(
        self,
        cost: Callable[[Subnet], float],
        goals: Sequence[Goal],
        *,
        storage: str | None,
        evaluations: int,
        proposals: int,
    ) -> Front:
        """Subnets evaluated under each of the goals, which are of one unit; see search.py.

        What was evaluated before for all these goals, through the same storage, is not searched for again.
        """
        progress, aims = self.context.progress, [self.aim(goal) for goal in goals]
        stored = Trials(self.study, storage, self.space, aims)
        singles = measure_singles(self.space, lambda one: stored.once(one, self.accuracy), progress=progress)
        front = search.search(
            self.space,
            self.accuracy,
            cost,
            Predictor.of(self.space, singles),
            seed=self.context.seed,
            study=self.study,
            storage=storage,
            known=singles,
            limits=[goal.limit_of(cost(self.space.largest)) for goal in goals],
            aims=aims,
            evaluations=evaluations,
            proposals=proposals,
            progress=progress,
        )
        tau = "none" if front.tau is None else f"{front.tau:.2f}"
        self.context.log.info(
            "subnet: %d evaluated of %d proposed; the predictor's tau is %s", front.evaluations, front.proposals, tau
        )
        return front


def as_figures(front: Front) -> dict[str, JsonValue]:
    """A front as plain JSON: the points that nothing beats, and how good the predictions were."""
    return {
        "evaluations": front.evaluations,
        "proposals": front.proposals,
        "tau": front.tau,
        "front": [point.as_json() for point in front.optimal],
    }


def apart(context: Context, step: Step) -> Data:
    """The data with the images held out that the elastic step held out."""
    assert context.data is not None  # Pipeline.check saw to it
    return context.data.apart(cast(int, step.config["held_out"]), step.seed)
