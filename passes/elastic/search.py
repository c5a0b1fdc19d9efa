"""Searching for subnets: many are proposed and ranked by prediction, few are evaluated, and those alone are reported.

Proposals are mutants and crosses of the best subnet found so far in each bucket of cost (AlphaNet, Wang et al. 2021,
arXiv:2102.07954). The one that is predicted to beat all that cost no more by the most points is evaluated, and the
prediction corrected. Each evaluation follows from its number, the seed and those before it, so a search by one process
ends with the same subnets whether or not it was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random

from slim.contract import Progress, no_progress
from slim.errors import PassError
from slim.passes.elastic import subnets
from slim.passes.elastic.archive import BUCKET, Front, Point, archive, unbeaten
from slim.passes.elastic.predictor import Predictor
from slim.passes.elastic.space import Space, Subnet
from slim.passes.elastic.trials import Trials

EVALUATIONS = 150
"""Subnets evaluated really."""
PROPOSALS = 2000
"""Subnets proposed for each evaluation."""
RUNGS = 6
"""Of the uniform ladder that a search begins with."""
STARTS = 8
"""Subnets of the greedy path that a search begins with, where no limit is given."""
PARENTS = 8
"""Subnets that proposals are made of where there is a limit: the best of the buckets nearest to it."""


def search(
    space: Space,
    accuracy: Callable[[Subnet], float],
    cost: Callable[[Subnet], float],
    predictor: Predictor,
    *,
    seed: int,
    study: str,
    storage: str | None = None,
    known: Mapping[Subnet, float] | None = None,
    limits: Sequence[float] = (),
    aims: Sequence[str] = (),
    evaluations: int = EVALUATIONS,
    proposals: int = PROPOSALS,
    progress: Progress = no_progress,
) -> Front:
    """Subnets that are accurate for what they cost.

    Args:
        space: what there is to choose from.
        accuracy: evaluates a subnet really, in percent.
        cost: of a subnet, predicted or counted; called for every proposal.
        predictor: of accuracy, from single changes.
        seed: of the proposals.
        study: name of the study. It has to name all that accuracy depends on: the supernet, the images, the repair.
        storage: URL of a database through which processes and searches share a study; none: in memory.
        known: accuracy of subnets evaluated before, such as the single changes; they count as found.
        limits: costs not to be exceeded. With any, nothing above the largest is evaluated, and the search looks for
            what is best under each in turn; without, for what is best at any cost.
        aims: what tells the limits apart from those of other searches in the study. Evaluations made for all of them
            count as this search's, so what was searched for several limits at once is not searched again for one.
        evaluations: by all processes that share the search; fewer where the space has no more.
        proposals: made and ranked for each evaluation.
        progress: told after every evaluation.

    Raises:
        StoreError: the storage cannot be opened.
        PassError: the search was begun with another space, or the accuracy of a subnet is no number.
    """
    one = _Search(space, cost, predictor, seed, proposals, limits, known or {}, Trials(study, storage, space, aims))
    done = one.trials.done
    with progress("search", evaluations) as advance:
        if done:
            advance(done)
        while (turn := one.trials.next(evaluations, one.propose)) is not None:
            with one.trials.giving_up(turn.trial):
                found = accuracy(turn.subnet)
                if not math.isfinite(found):
                    raise PassError(f"subnet: the accuracy of a subnet is {found}; check the supernet and its data")
                one.trials.tell(turn, found)
            before, done = done, one.trials.done
            advance(done - before, f"{found:.2f} % at {cost(turn.subnet):.4g}")
    evaluated = one.trials.finished()
    fitted = predictor.refit(one.known | evaluated)
    return Front(one.points(evaluated), fitted.tau, fitted.ridge, one.made, one.trials.done)


class _Search:
    """Proposals of one process."""

    def __init__(
        self,
        space: Space,
        cost: Callable[[Subnet], float],
        predictor: Predictor,
        seed: int,
        proposals: int,
        limits: Sequence[float],
        known: Mapping[Subnet, float],
        trials: Trials,
    ) -> None:
        self.space, self.cost, self.predictor, self.seed, self.trials = space, cost, predictor, seed, trials
        self.proposals, self.made = proposals, 0
        self.known = {space.canonical(subnet): found for subnet, found in known.items()}
        self.width = BUCKET * cost(space.largest)
        self.limits = sorted(limits) or [math.inf]
        self.starts = self._starts([*limits])

    def points(self, evaluated: Mapping[Subnet, float]) -> tuple[Point, ...]:
        """All that is known, cheapest first; costs are those of this process."""
        found = [Point(one, self.cost(one), accuracy) for one, accuracy in {**self.known, **evaluated}.items()]
        return tuple(sorted(found, key=lambda point: (point.cost, point.rank)))

    def propose(self, number: int) -> Iterator[Subnet]:
        """What to evaluate next, the best first: one of the starts, else the best of many proposals."""
        evaluated = self.trials.finished()
        taken = {*evaluated, *self.known}
        yield from (start for start in self.starts if start not in taken)
        points, front = self.points(evaluated), unbeaten(self.points(evaluated))
        if not points:
            return
        predictor, rng = self.predictor.refit({**self.known, **evaluated}), Random(f"{self.seed} {number}")
        for place in range(len(self.limits)):
            limit = self.limits[(number + place) % len(self.limits)]
            fresh = [one for one in self._proposals(points, limit, rng) if one not in taken]
            gains = {
                one: predicted - _best_within(front, self.cost(one) if limit == math.inf else limit)
                for one, predicted in zip(fresh, predictor.predict(fresh).tolist(), strict=True)
            }
            yield from sorted(fresh, key=lambda one: (-gains[one], one))

    def _proposals(self, points: Sequence[Point], limit: float, rng: Random) -> list[Subnet]:
        """Mutants and crosses of the best in each bucket of cost, or in those nearest to a limit."""
        parents = [*archive(points, self.width).values()]
        if limit < math.inf:
            parents = sorted(parents, key=lambda one: (abs(one.cost - limit), one.rank))[:PARENTS]
        found: dict[Subnet, None] = {}
        for _ in range(self.proposals):
            if rng.random() < 0.5:
                child = subnets.mutated(self.space, rng.choice(parents).subnet, rng)
            else:
                child = subnets.crossed(self.space, rng.choice(parents).subnet, rng.choice(parents).subnet, rng)
            found[child] = None
        self.made += len(found)
        return [one for one in found if self.cost(one) <= limit]

    def _starts(self, limits: Sequence[float]) -> list[Subnet]:
        """The largest and the smallest, the greedy path under each limit or at even steps of cost, and the ladder."""
        rungs = subnets.ladder(self.space, RUNGS)
        path = greedy(self.space, self.predictor, self.cost)
        low, high = self.cost(rungs[-1]), self.cost(rungs[0])
        aims = limits or [low + (high - low) * step / (STARTS + 1) for step in range(1, STARTS + 1)]
        under = [next((one for one in path if self.cost(one) <= aim), rungs[-1]) for aim in aims]
        starts = dict.fromkeys([rungs[0], rungs[-1], *under, *rungs[1:-1]])
        return [one for one in starts if self.cost(one) <= self.limits[-1]]


def greedy(space: Space, predictor: Predictor, cost: Callable[[Subnet], float]) -> list[Subnet]:
    """From the largest on, each time the step that costs the fewest points for what it saves, until none saves."""
    path = [space.largest]
    while True:
        here = path[-1]
        steps = [one for one in dict.fromkeys(_steps(space, here)) if cost(one) < cost(here)]
        if not steps:
            return path
        lost = predictor.predict([here])[0] - predictor.predict(steps)
        prices = {one: float(each) / (cost(here) - cost(one)) for one, each in zip(steps, lost, strict=True)}
        path.append(min(steps, key=lambda one: (prices[one], one)))


def _steps(space: Space, here: Subnet) -> Iterator[Subnet]:
    """One axis smaller, by as little as makes another network."""
    chosen = space.chosen(here)
    for number, choices in enumerate(space.axes):
        smaller = choices[choices.index(chosen[number]) + 1 :]
        made = (space.canonical(space.of((*chosen[:number], choice, *chosen[number + 1 :]))) for choice in smaller)
        # A rank that would not pay is none; the next one may.
        one = next((one for one in made if one != here), None)
        if one is not None and space.allows(one):
            yield one


def _best_within(front: Sequence[Point], cost: float) -> float:
    """Accuracy of the best that costs no more; 0 where there is none."""
    return max((point.accuracy for point in front if point.cost <= cost), default=0.0)
