"""Pipeline: a checked list of passes, run in the user's order under a guard.

Prepare + structure + repair is a stage; leading repairs are a stage of their own. Latency is judged right after the
structural pass, before its repair is paid for; accuracy at the end of the stage, on the same images. A stage that does
not pay is rolled back with its reason, and the chain goes on from the last good artifact.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from slim import costs, environment, store, verify
from slim.artifact import Artifact
from slim.contract import Context, Pass
from slim.distributed import on_main
from slim.errors import DataError, DivergedError, OrderError, PassError, UsageError
from slim.measurement import Measurement
from slim.quantization import quantization_of
from slim.runs import Figures, Record, Run, step_key

Stage = list[tuple[int, Pass]]
"""Positions in the chain, from 1, and their passes."""


class Guard(BaseModel):
    """What a stage must give and may cost."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_drop: float = Field(default=1.0, ge=0)
    """Largest loss of top-1 in one stage, points, against the artifact before the stage."""
    min_gain: float = Field(default=2.0, ge=0, lt=100)
    """Least latency a structural pass must save, percent; below 2 lies the noise of a file against itself."""
    on: bool = True
    """False keeps every stage whatever it costs; written into the history."""

    @property
    def largest_ratio(self) -> float:
        """Largest latency ratio (candidate / before) that pays."""
        return 1 - self.min_gain / 100

    def refuses_latency(self, ratio: Measurement) -> str | None:
        """Why the latency `ratio` (candidate / before) does not pay; none when it does."""
        limit = self.largest_ratio
        assert ratio.low is not None  # ratios are sampled, so they have an interval
        assert ratio.high is not None
        figures = f"{ratio.value:.3f}x, 95 % {ratio.low:.3f}..{ratio.high:.3f}; at most {limit:.3f}x pays"
        if not ratio.details.get("control", {}).get("fit", True):
            return f"latency inconclusive: the machine was too noisy to compare a file with itself ({figures})"
        if ratio.low > limit:
            return f"not faster: {figures}"
        if ratio.high > limit:
            return f"latency inconclusive: {figures}"
        return None

    def refuses_accuracy(self, drop: Measurement) -> str | None:
        """Why losing `drop` points is too much; none when it is not. Judged on the figure, the interval is shown."""
        if drop.value <= self.max_drop:
            return None
        interval = f"95 % {drop.low:.2f}..{drop.high:.2f}, n={drop.n}"
        return f"lost {drop.value:.2f} points ({interval}), allowed {self.max_drop:g}"


def leads(stage: Stage) -> bool:
    """Whether the stage is the leading one of repairs; every other begins with what its repairs belong to."""
    return stage[0][1].role == "repair"


@dataclass(frozen=True)
class Result:
    """What a pipeline leaves."""

    artifact: Artifact
    """The last good artifact."""
    dense: Artifact
    """What the figures of the whole run are compared with: the artifact before the first structural stage."""
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Pipeline:
    """A checked list of passes; itself callable."""

    passes: tuple[Pass, ...]
    guard: Guard = field(default_factory=Guard)

    def check(self, artifact: Artifact, context: Context, *, fresh_head: str = "") -> None:
        """Whether this order can work on this network and data, found before any work starts.

        `fresh_head`: why the classifier has never been trained, empty where it has.

        Raises:
            OrderError: a pass lacks a trait, a `prepare` has no structure after it, or a recovery none before.
            DataError: a pass needs a split that the data lacks, or a fresh head is not trained first.
        """
        traits = store.traits(artifact)
        ended, dropped_by = store.dropped_by(artifact), dict[str, str]()
        for position, step in enumerate(self.passes, 1):
            for trait in sorted(step.needs - traits):
                if trait in dropped_by:
                    cause = f"and {dropped_by[trait]} ends that; put {step.name!r} before it"
                elif trait in ended:
                    cause = f"and {ended[trait]!r} in its history ended that; start from an artifact before it"
                else:
                    cause = "which no pass before gives; add one that does"
                raise OrderError(f"step {position} {step.name!r} needs a {trait!r} network, {cause}")
            for trait in step.drops:
                dropped_by[trait] = f"step {position} {step.name!r}"
            traits = (traits - step.drops) | step.gives
            for split in sorted(step.reads):
                if context.data is None or not context.data.has(split):
                    pool, cut = "--unlabeled FOLDER or LIST", "--data with it, or --split train=0.8,val=0.2"
                    wanted = pool if split == "unlabeled" else cut
                    raise DataError(
                        f"step {position} {step.name!r} reads the split {split!r}, which the data lacks; give {wanted}"
                    )
        for position, step in enumerate(self.passes, 1):
            after = self.passes[position] if position < len(self.passes) else None
            # A family may be cut later, so what gives one may be the last.
            open_end = after is None and "supernet" in step.gives
            if step.role == "prepare" and not open_end and (after is None or after.role == "repair"):
                what = f"step {position + 1} {after.name!r} follows, which is none" if after else "none follows"
                raise OrderError(
                    f"step {position} {step.name!r} prepares a structural pass, but {what}; put one right after it"
                )
        if fresh_head and context.data is not None and not (self.passes and self.passes[0].trains):
            first = f"{self.passes[0].name!r} does not" if self.passes else "there is none"
            raise DataError(f"{fresh_head}: the first pass must train it, and {first}; begin with finetune")
        for stage in self.stages():
            for position, step in stage:
                if step.recovers and leads(stage):
                    raise OrderError(
                        f"step {position} {step.name!r} learns from the network before its stage, but no structural"
                        " pass comes before it; give --teacher NAME or PATH, or put it behind one"
                    )

    def forecast(self, artifact: Artifact, context: Context) -> list[dict[str, JsonValue]]:
        """What each pass will cost, by name, before any work starts.

        Raises:
            UsageError: a pass cannot work with this network, teacher or data.
        """
        known = replace(context, backbone=artifact.backbone, reference=artifact, dense=artifact)
        found = []
        for position, step in enumerate(self.passes, 1):
            try:
                found.append(step.forecast(artifact, known))
            except PassError as error:  # what cannot work is the chain's fault as long as no pass has run
                raise UsageError(f"step {position} {step.name!r}: {error}") from error
        return found

    def stages(self) -> list[Stage]:
        """prepare* structure repair*; leading repairs are a stage of their own."""
        stages: list[Stage] = []
        open_until = ""  # the role that the last pass of the open stage had
        for position, step in enumerate(self.passes, 1):
            begins = step.role != "repair" and open_until != "prepare"
            if begins or not stages:
                stages.append([])
            stages[-1].append((position, step))
            open_until = step.role
        return stages

    def __call__(self, artifact: Artifact, context: Context, run: Run | None = None) -> Result:
        """Run every stage. With a `run`, each finished step is kept there, and taken from there when it is found."""
        self.check(artifact, context)
        good = dense = artifact
        context = replace(context, backbone=artifact.backbone)
        records: list[Record] = []
        for number, stage in enumerate(self.stages(), 1):
            stage_context = replace(context, reference=good, dense=dense, guard=self.guard.on)
            good, finished = self._run_stage(number, stage, good, stage_context, run)
            records += finished
            if leads(stage):
                dense = good
        return Result(good, dense, tuple(records))

    def _run_stage(
        self, number: int, stage: Stage, reference: Artifact, context: Context, run: Run | None
    ) -> tuple[Artifact, list[Record]]:
        candidate, refusal = reference, None
        records: list[Record] = []
        for position, step in stage:
            if refusal is not None:
                records.append(_record(step, position, number, outcome="not run", reason="its stage was rolled back"))
                continue
            candidate, record = self._run_step(step, position, number, candidate, context, run)
            records.append(record)
            if self.guard.on and step.role == "structure" and "latency_ratio" in record.figures:
                refusal = self.guard.refuses_latency(record.figures["latency_ratio"])
                caveat = step.caveat(record.figures)
                if refusal is not None and caveat:
                    refusal = f"{refusal}; {caveat}"
        if self.guard.on and refusal is None and "top1_drop_points" in records[-1].figures:
            refusal = self.guard.refuses_accuracy(records[-1].figures["top1_drop_points"])
        judged = [_judged(record, refusal, self.guard) for record in records]
        for record in judged:
            context.log.info("%d %s: %s: %s", record.position, record.name, record.outcome, record.reason)
            _put(record, run)
        return (candidate if refusal is None else reference), judged

    def _run_step(
        self, step: Pass, position: int, stage: int, given: Artifact, context: Context, run: Run | None
    ) -> tuple[Artifact, Record]:
        """The artifact after a step, done or found, and its record with figures, not judged yet."""
        assert context.reference is not None  # __call__ set it
        reference = context.reference
        key = step_key(step, given, reference, context)
        found = on_main(lambda: run.find(key) if run is not None else None)
        if run is None or found is None or found.folder is None:
            after, record = _work(step, position, stage, given, key, context, run)
        else:
            context.log.info("%d %s: found finished in %s", position, step.name, found.folder)
            folder = run.root / found.folder
            after = on_main(lambda: store.load(folder, trust=given.trust))
            record = found.model_copy(update={"position": position, "stage": stage, "outcome": "pending", "reason": ""})
        # Before it is measured: a run that ends meanwhile need not train again.
        _put(record, run)
        limit = self.guard.largest_ratio if self.guard.on else None
        record = on_main(lambda: _with_figures(record, step, after, reference, context, limit))
        _put(record, run)
        return after, record


def _work(
    step: Pass, position: int, stage: int, given: Artifact, key: dict[str, str], context: Context, run: Run | None
) -> tuple[Artifact, Record]:
    """Do a step; with a `run`, its artifact is in its folder afterwards."""
    folder = checkpoint = None
    if run is not None:
        differs = on_main(lambda: run.differs(position, key))
        if differs:
            context.log.info("%d %s: done again, it differs in: %s", position, step.name, differs)
        folder = on_main(lambda: run.step_folder(position, step.name, key))
        checkpoint = run.checkpoint(position, step.name, key)
    started = time.perf_counter()
    try:
        after = step(given, replace(context, checkpoint=checkpoint))
    except DivergedError as error:
        raise DivergedError(f"step {position} {step.name!r}: {error}") from error
    seconds = {"pass": round(time.perf_counter() - started, 3)}
    if run is not None and folder is not None and checkpoint is not None:
        place, spent = run.root / folder, checkpoint
        on_main(lambda: store.save(after, place))
        on_main(lambda: spent.unlink(missing_ok=True))
    plan = after.history[-1].plan
    record = _record(step, position, stage, outcome="pending", seconds=seconds, plan=plan, folder=folder, key=key)
    return after, record


def _with_figures(
    record: Record, step: Pass, after: Artifact, reference: Artifact, context: Context, limit: float | None
) -> Record:
    """The record with figures: its own where they were taken under the same conditions, else measured now."""
    measured = _measured_on(context)
    if record.figures and record.measured == measured:
        return record
    started = time.perf_counter()
    figures = _measure(step, after, reference, context, limit)
    seconds = {**record.seconds, "measure": round(time.perf_counter() - started, 3)}
    return record.model_copy(update={"figures": figures, "measured": measured, "seconds": seconds})


def _put(record: Record, run: Run | None) -> None:
    if run is not None:
        on_main(lambda: run.put(record))


def _measure(step: Pass, after: Artifact, reference: Artifact, context: Context, limit: float | None) -> Figures:
    """Figures of the artifact after a step; ratio and drop are against `reference`, the ratio decided at `limit`."""
    figures = costs.figures(after.costs)
    meter = context.meter
    if meter is None:
        return figures
    figures["parity_max_abs"] = verify.ship(after, meter)
    figures["size_bytes"] = meter.size(after)
    served = quantization_of(after.history)
    if served is not None and served.precision == "int8" and (coverage := meter.coverage(after)) is not None:
        figures["int8_coverage"] = coverage
    if step.role == "structure":
        figures["latency_ratio"] = meter.compare(after, reference, limit=limit)
    figures["latency_p50_ms"] = meter.latency(after)
    if context.data is not None and context.data.has("val"):
        figures["accuracy_top1"] = meter.accuracy(after)
        figures["top1_drop_points"] = meter.drop(after, reference)
    return figures


def _measured_on(context: Context) -> dict[str, str]:
    """What the figures of a step depend on besides the artifacts."""
    if context.meter is None:
        return {}
    on = {"target": context.meter.target, "device": environment.fingerprint()}
    if context.data is not None and context.data.has("val"):
        on |= {"data": context.data.id, "split": context.data.membership("val")}
    return on


def _record(step: Pass, position: int, stage: int, **fields: Any) -> Record:
    config = step.model_dump(mode="json")
    return Record(position=position, name=step.name, role=step.role, stage=stage, config=config, **fields)


def _judged(record: Record, refusal: str | None, guard: Guard) -> Record:
    """The record with its outcome and reason, once its stage was judged."""
    if record.outcome == "not run":
        return record
    if refusal is not None:
        return record.model_copy(update={"outcome": "rolled back", "reason": refusal})
    ratio, drop = record.figures.get("latency_ratio"), record.figures.get("top1_drop_points")
    said = [f"{ratio.value:.2f}x latency"] if ratio else []
    said += [f"{0 - drop.value:+.2f} points"] if drop else []
    reason = ", ".join(said) or "not measured"
    return record.model_copy(update={"outcome": "kept", "reason": reason if guard.on else f"{reason} (guard off)"})
