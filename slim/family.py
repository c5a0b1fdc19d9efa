"""The job of `slim family`: an elastic network becomes a network for each of several budgets.

One latency table, one search for all budgets, and a run for each, which cuts its subnet out under the guard, polishes,
exports and measures it as any run does. The runs find the table and the search done.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import JsonValue
from rich.markup import escape
from rich.table import Table

from slim import environment, job, recipe, store
from slim.bench import front_chart
from slim.bench.measure import TargetMeter
from slim.bench.wording import gain, number
from slim.contract import Context, Pass, Progress, no_progress
from slim.distributed import is_main, on_main
from slim.errors import PassError, UsageError
from slim.goal import Goal, parse_goal
from slim.job import Job
from slim.measurement import Measurement
from slim.options import PLACES, value_of
from slim.passes.distill import Distill
from slim.passes.elastic import BestSubnet
from slim.passes.elastic.archive import Front, Point
from slim.passes.elastic.dense import Dense
from slim.passes.elastic.family import Family, as_figures
from slim.passes.elastic.latency import LatencyModel
from slim.passes.elastic.priced import Priced
from slim.passes.elastic.subnets import from_json
from slim.passes.reach import cost_of
from slim.recipe import Recipe, build_pass
from slim.runs import Run, step_key
from slim.served import recipe_of, run_around

FORMAT = "slim-family/1"
MANIFEST = "family.json"
MISSED = 3
"""Exit code when a budget was missed; as in bench/budget.py."""
FIGURES = {"latency": "latency_p50_ms", "params": "params", "macs": "macs", "size": "size_bytes"}
"""What a budget limits -> the figure of a report that it is compared with."""


@dataclass(frozen=True)
class Wishes:
    """What `slim family` is asked for, besides the budgets."""

    settings: Mapping[str, Any]
    """Fields of `subnet`: `evaluations`, `proposals`, `repair`."""
    storage: str
    """URL of the database that the search is kept in."""
    table: Path
    """Where the latency table is, or will be."""
    polish: int = 0
    """Epochs of distillation from the elastic network."""


@dataclass(frozen=True)
class Row:
    """What became of one budget."""

    to: str
    outcome: Literal["kept", "whole", "rolled back", "not cut"]
    """`whole`: the elastic network itself is within the budget."""
    reason: str
    folder: str | None
    """The run; none where nothing was cut out."""
    figures: Mapping[str, Measurement] = field(default_factory=dict)
    """Of the subnet; ratio and drop are against the largest."""
    largest: Mapping[str, Measurement] = field(default_factory=dict)
    """Of the elastic network."""
    subnet: Mapping[str, Any] | None = None

    @property
    def cost(self) -> Measurement | None:
        """What the budget limits."""
        return self.figures.get(FIGURES[parse_goal(self.to).metric])

    @property
    def ratio(self) -> Measurement | None:
        """Of that cost, to the largest."""
        before = self.largest.get(FIGURES[parse_goal(self.to).metric])
        if parse_goal(self.to).timed:
            return self.figures.get("latency_ratio")
        if self.cost is None or before is None:
            return None
        return Measurement(metric="ratio", value=self.cost.value / before.value, unit="ratio")

    def as_json(self) -> dict[str, Any]:
        """Plain JSON, with figures and without their samples."""
        figures = {name: one.model_dump(mode="json", exclude=RAW) for name, one in self.figures.items()}
        ratio, points = self.ratio, gain(self.figures)
        return {
            **{name: getattr(self, name) for name in ("to", "outcome", "reason", "folder", "subnet")},
            "cost": self.cost.value if self.cost else None,
            "ratio": ratio.value if ratio else None,
            "points": points.value + 0.0 if points else None,  # never -0.0
            "figures": figures,
        }


RAW = {"samples", "details", "environment"}
"""Fields of a measurement that the run's report has."""


@dataclass(frozen=True)
class Cut:
    """All that was cut out, and the search it came from."""

    rows: tuple[Row, ...]
    front: Front | None
    """None where the whole network is within every budget."""
    said: Mapping[str, JsonValue]
    """Of the prediction of costs."""

    @property
    def exit_code(self) -> int:
        """0 where every budget is kept by what lies in its folder."""
        return 0 if all(row.outcome in ("kept", "whole") for row in self.rows) else MISSED


def given_by(folder: Path, options: Mapping[str, Any], keys: Iterable[str]) -> Recipe:
    """The recipe without passes that options give: of `keys` they do not give, what the run of the network says.

    Raises:
        UsageError: there is no network, or a value that cannot be.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give a run or an artifact")
    own = (folder / "recipe.yaml").is_file()
    if own and not (folder / "final").is_dir():
        raise UsageError(f"{folder}: the run is not finished; end it with --resume, or name one of its steps/")
    store.artifact_folder(folder)
    found = Run(folder) if own else run_around(folder, trust=False)
    known = recipe_of(found).resolved() if found else {}
    values: dict[str, Any] = {key: known[key] for key in keys if known.get(key) is not None}
    if options.get("data"):  # its split and limits are of the other images
        values.pop("data", None)
    for option, place in PLACES.items():
        if options.get(option) is not None:
            recipe.put(values, place, value_of(option, options[option]), said=f"--{option.replace('_', '-')}")
    if options.get("no_guard"):
        recipe.put(values, "guard.on", False, said="--no-guard")
    # Absolute, for a timm name is never taken for a folder, and a run may go on from another place.
    values |= {"model": {"name": str(folder.absolute())}, "export": {"format": "onnx"}}
    return recipe.parse(values, place="command line")


def prepared(given: Recipe, folder: Path, *, trust: bool) -> Job:
    """The network, data and target of a recipe whose network is elastic.

    Raises:
        UsageError: it is not, or anything that `slim run` would refuse.
    """
    found = job.prepare(given, trust=trust)
    artifact = found.start.artifact
    if "supernet" in store.traits(artifact):
        return found
    ended = store.dropped_by(artifact).get("supernet")
    if ended:
        raise UsageError(
            f"{folder}: its network is elastic no more, for {ended!r} cut one out; give the step of its run that "
            "'elastic' left, in steps/"
        )
    raise UsageError(f"{folder}: its network is not elastic; `slim run --model {folder} ... elastic` makes it so")


def table(found: Job, place: Path, *, again: bool = False, progress: Progress = no_progress) -> LatencyModel:
    """Measure whole subnets on the target into the file `place`; what it holds is measured only `again`.

    Of a network that is not elastic, those that it could be cut to (see passes/elastic/dense.py).

    Raises:
        StoreError: it holds the table of another device, target or network.
    """
    artifact = found.start.artifact
    with job.metering(found) as meter:  # of its own, for the exported files of thirty networks go with it
        assert meter is not None  # the callers saw to a target
        context = replace(found.context(meter=meter, progress=progress), **_known(found))
        kind = Priced if "supernet" in store.traits(artifact) else Dense
        return kind.of(artifact.model(), context).tabled(meter, place, again=again)


def goals_of(text: str) -> tuple[Goal, ...]:
    """The budgets in `2ms,4ms`, each once.

    Raises:
        UsageError: no goal, or goals of several kinds.
    """
    try:
        goals = tuple(parse_goal(one.strip()) for one in dict.fromkeys(text.split(",")))
    except ValueError as error:
        raise UsageError(f"--to {text}: {error}") from error
    if len({goal.metric for goal in goals}) > 1:
        kinds = ", ".join(dict.fromkeys(goal.metric for goal in goals))
        raise UsageError(f"--to {text}: budgets of {kinds} in one picture; give those of one kind at a time")
    return goals


def cut(
    found: Job, goals: Sequence[Goal], wishes: Wishes, out: Path, *, resume: bool, progress: Progress = no_progress
) -> Cut:
    """A run in `out` for each budget, `family.json` and `front.svg`; what was finished is taken up with `resume`.

    Raises:
        UsageError: the order, data or target cannot work, or `out` is taken.
        StoreError: the table is of another device, target or network.
    """
    found.recipe.model_copy(update={"passes": _chain(goals[0], wishes)}).pipeline().check(
        found.start.artifact, found.context()
    )
    if goals[0].measured and found.target is None:
        raise UsageError(f"--to {goals[0]} is measured on the exported file; add --target, as ort:cpu")
    on_main(lambda: _open(out, resume=resume))
    with job.metering(found, progress) as meter:
        within, front, said = on_main(lambda: _searched(found, goals, wishes, meter, progress))
        rows = []
        for goal in goals:
            chain = () if goal in within else _chain(goal, wishes)
            one = replace(found, recipe=found.recipe.model_copy(update={"passes": chain}))
            rows.append(_row(goal, one, out / str(goal), meter, progress))
    result = Cut(tuple(rows), front, said)
    if is_main():
        _write(result, found, goals[0].unit, out)
    return result


def to_console(rows: Sequence[Row]) -> Table:
    """The table of budgets."""
    shown = Table("budget", box=None, pad_edge=False)
    for heading in ("measured", "ratio", "top-1", "points"):
        shown.add_column(heading, justify="right")
    shown.add_column("verdict and why")
    for row in rows:
        figures = (row.cost, row.ratio, row.figures.get("accuracy_top1"))
        points = gain(row.figures)
        shown.add_row(
            row.to,
            *("" if one is None else number(one) for one in figures),
            "" if points is None else number(points, sign=True).removesuffix(" points"),
            escape(f"{row.outcome}: {row.reason}" if row.reason else row.outcome),
        )
    return shown


def _known(found: Job) -> dict[str, Any]:
    """What a pass knows of its network."""
    return {"backbone": found.start.artifact.backbone, "history": found.start.artifact.history}


def _chain(goal: Goal, wishes: Wishes) -> tuple[Pass, ...]:
    table = {"table": str(wishes.table)} if goal.timed else {}
    values = {name: value for name, value in wishes.settings.items() if value is not None}
    subnet = build_pass(BestSubnet, {"to": str(goal), "storage": wishes.storage, **table, **values})
    return (subnet, build_pass(Distill, {"epochs": wishes.polish})) if wishes.polish else (subnet,)


def _open(out: Path, *, resume: bool) -> None:
    """Take the folder `out`, or go on in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / MANIFEST).is_file():
            raise UsageError(f"--out {out}: exists and is not a family; choose another place")
        if not resume:
            raise UsageError(f"--out {out}: holds a family already; add --resume to go on, or choose another place")
        return
    out.mkdir(parents=True, exist_ok=True)
    store.write_text(out / MANIFEST, json.dumps({"format": FORMAT, "budgets": []}) + "\n")


def _searched(
    found: Job, goals: Sequence[Goal], wishes: Wishes, meter: TargetMeter | None, progress: Progress
) -> tuple[set[Goal], Front | None, dict[str, JsonValue]]:
    """Budgets that the whole network is within; for the others, what one search found, and of the prediction."""
    context: Context = replace(found.context(meter=meter, progress=progress), **_known(found))
    model, subnet = found.start.artifact.model(), _chain(goals[0], wishes)[0]
    assert isinstance(subnet, BestSubnet)
    family = Family.of(model, context, repair=subnet.repair)
    if goals[0].timed:
        table(found, wishes.table, progress=progress)
    before = cost_of(goals[0], context.fed(model), context, "family")
    within = {goal for goal in goals if before <= goal.limit_of(before)}
    cost, said = family.costs(goals[0], subnet.table)
    left = [goal for goal in goals if goal not in within]
    if not left:
        return within, None, said
    searching = {"evaluations": subnet.evaluations, "proposals": subnet.proposals}
    return within, family.search(cost, left, storage=subnet.storage, **searching), said


def _row(goal: Goal, one: Job, folder: Path, meter: TargetMeter | None, progress: Progress) -> Row:
    """The run of one budget, and what became of it."""
    try:
        done = on_main(lambda: _finished(one, folder, meter))  # others may look when rank 0 is through
        run = Run(folder, one.start.artifact.trust)
        if not done:
            run = job.execute(one, folder, resume=folder.exists(), progress=progress, meter=meter)
    except PassError as error:
        return Row(str(goal), "not cut", str(error).removeprefix("subnet: "), None)
    report = run.report
    if not report.steps:
        figures, words = report.final, "the whole network is within it"
        return Row(str(goal), "whole", words, str(folder), figures, report.dense)
    subnet = report.steps[0]
    if subnet.outcome == "kept":
        return Row(str(goal), "kept", "", str(folder), report.final, report.dense, subnet.plan["subnet"])
    figures = {name: figure for step in report.steps for name, figure in step.figures.items()}
    return Row(str(goal), "rolled back", subnet.reason, str(folder), figures, report.dense, subnet.plan["subnet"])


def _finished(one: Job, folder: Path, meter: TargetMeter | None) -> bool:
    """Whether the run in `folder` is this one to its end, here."""
    run = Run(folder, one.start.artifact.trust)
    if not (folder / "report.json").is_file() or recipe_of(run).resolved() != one.recipe.resolved():
        return False
    if run.report.environment["fingerprint"] != environment.fingerprint():
        return False
    context = replace(one.context(meter=meter), guard=one.recipe.guard.on)
    artifact, steps = one.start.artifact, one.recipe.passes
    return bool(steps and run.find(step_key(steps[0], artifact, artifact, context)))


def _write(result: Cut, found: Job, unit: str, out: Path) -> None:
    """family.json, and front.svg where anything was searched for."""
    artifact, front, target = found.start.artifact, result.front, found.target
    known = {"model": artifact.backbone.name, "supernet": artifact.digest, "target": str(target) if target else None}
    listed: dict[str, Any] = {
        "format": FORMAT,
        **known,
        "unit": unit,
        "budgets": [row.as_json() for row in result.rows],
    }
    if front is not None:
        listed["search"] = {**as_figures(front), **result.said, "points": [point.as_json() for point in front.points]}
        there = {point.subnet: _place(point) for point in front.points}
        cut_out = [(row.to, from_json(row.subnet)) for row in result.rows if row.subnet is not None]
        picture = front_chart.to_svg(
            [*there.values()],
            [_place(point) for point in front.optimal],
            # Not there: what another process found since, or the smallest, taken unseen where predictions were off.
            {to: there[subnet] for to, subnet in cut_out if subnet in there},
            unit,
            f"{artifact.backbone.name}: what one training gives at every cost",
            f"{'predicted for ' + str(target) if unit == 'ms' else 'counted'}; images held out of training",
        )
        store.write_text(out / "front.svg", picture)
    store.write_text(out / MANIFEST, json.dumps(listed, indent=1, allow_nan=False) + "\n")


def _place(point: Point) -> tuple[float, float]:
    return point.cost, point.accuracy
