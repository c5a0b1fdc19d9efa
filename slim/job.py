"""The main job: a recipe becomes a run folder with a measured file in it.

Start (network, data, target) -> check -> pipeline -> final artifact, dense.onnx, bundle, report.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import JsonValue

from slim import costs, environment, store
from slim.artifact import Artifact
from slim.bench.measure import TargetMeter
from slim.bench.report import DataUsed, Report
from slim.bench.report import write as write_report
from slim.contract import Context, Loading, Pass, Progress, no_progress
from slim.data import open_data
from slim.distributed import on_main
from slim.errors import UsageError
from slim.export.bundle import write_bundle
from slim.export.golden import golden_images
from slim.export.onnx import OnnxFile, export_onnx
from slim.export.target import Target
from slim.measurement import Measurement
from slim.pipeline import Guard, Result
from slim.pretrained import Start, start
from slim.recipe import ExportSpec, Recipe, parse
from slim.runs import Figures, Record, Run

log = logging.getLogger("slim")


@dataclass(frozen=True)
class Job:
    """A recipe whose network, data and target are at hand, and whose order can work."""

    recipe: Recipe
    start: Start
    target: Target | None
    device: torch.device
    forecasts: tuple[dict[str, JsonValue], ...] = ()
    """What each pass will cost, by name."""

    def context(self, **fields: Any) -> Context:
        """What the passes may use."""
        data = self.recipe.data
        loading = Loading(data.batch_size, data.workers) if data else Loading()
        return Context(data=self.start.data, device=self.device, seed=self.recipe.seed, loading=loading, **fields)


def prepare(recipe: Recipe, *, trust: bool = False) -> Job:
    """Open everything and check the order; changes nothing on disk.

    Raises:
        UsageError: whatever cannot work, before any work starts.
        TargetError: the target's runtime is not installed.
    """
    target = Target.parse(recipe.target) if recipe.target else None
    if target:
        target.probe()
    spec = recipe.data
    log.info("model %s, data %s, target %s", recipe.model.name, spec.source if spec else "none", target or "none")
    data = (
        open_data(
            spec.source,
            split=spec.split,
            unlabeled=spec.unlabeled,
            calib=spec.calib,
            seed=recipe.seed,
            limit_train=spec.limit.train,
            limit_val=spec.limit.val,
        )
        if spec
        else None
    )
    begin = start(recipe.model, data, seed=recipe.seed, trust=trust)
    for position, step in enumerate(recipe.passes, 1):
        if step.measures and target is None:
            raise UsageError(f"step {position} {step.name!r} times networks while it plans; add --target, as ort:cpu")
    job = Job(recipe, begin, target, _device(recipe.device))
    pipeline, context = recipe.pipeline(), job.context()
    pipeline.check(begin.artifact, context, fresh_head=begin.fresh_head)
    return replace(job, forecasts=tuple(pipeline.forecast(begin.artifact, context)))


@contextmanager
def metering(job: Job, progress: Progress = no_progress) -> Iterator[TargetMeter | None]:
    """What measures on the job's target, with a folder for exported files; none where there is no target."""
    with tempfile.TemporaryDirectory(prefix="slim-") as folder:
        yield _meter(job, Path(folder), progress) if job.target else None


def execute(
    job: Job,
    out: Path,
    *,
    resume: bool = False,
    progress: Progress = no_progress,
    meter: TargetMeter | None = None,
) -> Run:
    """Run the chain into the folder `out`; what was finished there is taken up with `resume`.

    Several jobs on one target may share a `meter`: what one has measured, the next need not.
    """
    recipe = job.recipe
    trust = job.start.artifact.trust
    run = on_main(lambda: Run.open(out, recipe.resolved(), resume=resume, trust=trust))
    with _threads(recipe.threads), tempfile.TemporaryDirectory(prefix="slim-") as folder:
        artifact = job.start.artifact
        if meter is None and job.target:
            meter = _meter(job, Path(folder), progress)
        result = recipe.pipeline()(artifact, job.context(meter=meter, progress=progress), run)
        on_main(lambda: _finish(job, run, result, meter, Path(folder)))
    return run


def run(
    *,
    model: str | Mapping[str, Any],
    passes: Sequence[Pass | Mapping[str, Any]],
    out: str | Path,
    data: str | Mapping[str, Any] | None = None,
    target: str | None = None,
    export: str | None = "onnx",
    guard: Guard | None = None,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int | None = None,
    resume: bool = False,
    trust: bool = False,
    progress: Progress = no_progress,
) -> Run:
    """The main job in one call; what it left is in the `Run`: `.artifact`, `.report`, `.bundle`.

    `model` and `data` take a name, or the mapping that a recipe has there; so does each pass.

    Raises:
        SlimError: as the command line reports it; see slim/errors.py.
    """
    recipe = parse(
        {
            "model": model,
            "data": data,
            "target": target,
            "seed": seed,
            "device": device,
            "threads": threads,
            "guard": guard or Guard(),
            "passes": tuple(passes),
            "export": ExportSpec.model_validate({"format": export}) if export else None,
        },
        place="slim.run",
    )
    return execute(prepare(recipe, trust=trust), Path(out), resume=resume, progress=progress)


def _finish(job: Job, run: Run, result: Result, meter: TargetMeter | None, folder: Path) -> None:
    """Write everything a finished run leaves: final/, dense.onnx, bundle/, report.json and report.html."""

    def exported(artifact: Artifact) -> OnnxFile:
        if meter is not None:
            return meter.export(artifact)
        return export_onnx(artifact.model(), folder / f"{artifact.digest[:16]}.onnx", artifact.backbone.input)

    store.save(result.artifact, run.final)
    records = result.records
    if meter is not None:
        records = _side_by_side(run, result, meter)
    dense, final = _figures(result.dense, meter), _figures(result.artifact, meter)
    if meter is not None:
        final |= _against(result, meter)
    store.write_bytes(run.dense, exported(result.dense).path.read_bytes())
    if job.recipe.export:
        images = golden_images(job.start.data, result.artifact.backbone.input)
        file = exported(result.artifact)
        write_bundle(run.bundle, result.artifact, file, final, target=job.target, images=images)
    write_report(_report(job, records, result, dense, final), run.root)


def _side_by_side(run: Run, result: Result, meter: TargetMeter) -> tuple[Record, ...]:
    """The records with latencies that were all taken in turn in one run, together with the dense and the final one.

    What the steps were judged on are ratios. Their milliseconds come from different minutes of a machine that is not
    always equally fast; in one table they would tell of steps that gave or cost what no step did.
    """
    trust = result.artifact.trust
    kept = {
        record.position: store.load(run.root / record.folder, trust=trust)
        for record in result.records
        if record.folder is not None
    }
    meter.latencies([result.dense, result.artifact, *kept.values()])
    return tuple(
        record.model_copy(
            update={"figures": {**record.figures, "latency_p50_ms": meter.latency(kept[record.position])}}
        )
        if record.position in kept
        else record
        for record in result.records
    )


def _meter(job: Job, folder: Path, progress: Progress) -> TargetMeter:
    assert job.target is not None  # asked for by the caller
    return TargetMeter(job.target, job.start.data, folder, seed=job.recipe.seed, progress=progress)


def _figures(artifact: Artifact, meter: TargetMeter | None) -> dict[str, Measurement]:
    figures = costs.figures(artifact.costs)
    if meter is None:
        return figures
    figures |= {"size_bytes": meter.size(artifact), "parity_max_abs": meter.parity(artifact)}
    figures["latency_p50_ms"] = meter.latency(artifact)
    if meter.data is not None and meter.data.has("val"):
        figures["accuracy_top1"] = meter.accuracy(artifact)
    return figures


def _against(result: Result, meter: TargetMeter) -> dict[str, Measurement]:
    """The final file against the dense one; known without measuring where they are the same file."""
    judged = meter.data is not None and meter.data.has("val")
    if result.artifact.digest == result.dense.digest:
        known = [("latency_ratio", 1.0, "ratio")]
        known += [("top1_drop_points", 0.0, "points"), ("top1_agreement", 100.0, "percent")] if judged else []
        details = {"same_file": True}
        return {
            metric: Measurement(metric=metric, value=value, unit=unit, target=meter.target, details=details)
            for metric, value, unit in known
        }
    figures = {"latency_ratio": meter.compare(result.artifact, result.dense)}
    if judged:
        figures["top1_drop_points"] = meter.drop(result.artifact, result.dense)
        figures["top1_agreement"] = meter.agreement(result.artifact, result.dense)
    return figures


def _report(job: Job, records: tuple[Record, ...], result: Result, dense: Figures, final: Figures) -> Report:
    recipe, data = job.recipe, job.start.data
    structures = [record for record in records if record.role == "structure"]
    notices = []
    if structures and all(record.outcome != "kept" for record in structures):
        notices.append("every structural stage was rolled back: the network is as large as it was")
    if job.target is None:
        notices.append("latency was not measured: the run had no --target")
    if data is None:
        notices.append("accuracy was not measured: the run had no --data")
    if not recipe.guard.on:
        notices.append("the guard was off: every stage was kept, whatever it cost")
    return Report(
        model=recipe.model.name,
        target=str(job.target) if job.target else None,
        data=DataUsed(
            source=data.source,
            id=data.id,
            train=len(data.split("train")) if data.has("train") else None,
            val=len(data.split("val")) if data.has("val") else None,
        )
        if data
        else None,
        seed=recipe.seed,
        guard=recipe.guard,
        notices=tuple(notices),
        environment=environment.describe(),
        dense=dense,
        steps=records,
        final=final,
        dense_input=result.dense.backbone.input,
        final_input=result.artifact.backbone.input,
        file="bundle/model.onnx" if recipe.export else None,
    )


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; use --device cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
