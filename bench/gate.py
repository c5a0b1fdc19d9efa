"""The gate: a run's shipped file is measured again on this machine against the run's dense.onnx, and judged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from slim import costs, environment
from slim.bench import accuracy, budget, latency
from slim.bench.budget import METRICS, Verdict
from slim.bench.measure import measure_accuracy
from slim.contract import Progress, no_progress
from slim.data import open_data
from slim.errors import StoreError, UsageError
from slim.export.target import Target
from slim.measurement import Measurement
from slim.recipe import parse, read
from slim.runs import Figures, Run, open_run


def gate(
    run_folder: str | Path,
    budgets: str | Path,
    *,
    stored: bool = False,
    trust: bool = False,
    seed: int = 0,
    progress: Progress = no_progress,
) -> tuple[Verdict, ...]:
    """A verdict on each budget of the file `budgets`. Writes nothing.

    Args:
        run_folder: a run with a bundle.
        budgets: budgets.yaml.
        stored: judge the figures of report.json instead of measuring again.
        trust: import the run's `package.module:factory` backbone, which counting its parameters needs.
        seed: of the inputs and the bootstrap.
        progress: shown while measuring.

    Raises:
        UsageError: no such run or file, or a figure that this run cannot give.
        StoreError: the bundle holds another file than the one that was measured.
        TargetError: the runtime is not installed.
    """
    wanted, run = budget.load(Path(budgets)), open_run(Path(run_folder), trust=trust)
    candidate = shipped(run)
    target, here = Target.parse(wanted.target), environment.fingerprint()
    metrics = budget.needs(wanted.budgets, fingerprint=here)
    # Rounds are added while this limit is undecided; with two of them, the first.
    limit = next((one.limit for one in wanted.budgets if one.metric == "latency_ratio"), None)
    if stored:
        figures = _stored(run, target, metrics, here)
    else:
        figures = _measured(run, candidate, target, metrics, limit, seed, progress)
    return budget.judge(wanted.budgets, figures, fingerprint=here)


def shipped(run: Run) -> Path:
    """The file that the run ships, once it is known to be the one that was measured.

    Raises:
        UsageError: the run has no bundle.
        StoreError: the file or its description was changed since.
    """
    file, manifest = run.bundle / "model.onnx", run.bundle / "manifest.json"
    for path in (file, manifest):
        if not path.is_file():
            raise UsageError(f"{path}: is missing; end the chain of `slim run` with export")
    try:
        recorded = json.loads(manifest.read_bytes())["files"][file.name]["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{manifest}: names no sha256 of {file.name}; write the bundle again") from error
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != recorded:
        raise StoreError(
            f"{file}: sha256 {found[:12]} is not {str(recorded)[:12]} of {manifest.name}; the file was changed after "
            "it was measured, write the bundle again"
        )
    return file


def _stored(run: Run, target: Target, metrics: frozenset[str], here: str) -> Figures:
    report = run.report
    timed = sorted(metric for metric in metrics if METRICS[metric].order > 0)
    if timed and report.target != str(target):
        raise UsageError(f"--stored: {run.root} was measured on {report.target}, the budgets are for {target}")
    if timed and report.environment.get("fingerprint") != here:
        raise UsageError(f"--stored: {', '.join(timed)} of {run.root} were taken on another device; leave out --stored")
    return dict(report.final)


def _measured(
    run: Run,
    candidate: Path,
    target: Target,
    metrics: frozenset[str],
    limit: float | None,
    seed: int,
    progress: Progress,
) -> Figures:
    if not run.dense.is_file():
        raise UsageError(f"{run.dense}: is missing; finish the run with `slim run --resume`")
    figures: dict[str, Measurement] = {
        "size_bytes": Measurement(metric="size_bytes", value=candidate.stat().st_size, unit="bytes"),
    }
    if metrics & {"params", "macs"}:
        figures |= costs.figures(run.artifact.costs)
    if metrics & {"top1_drop_points", "top1_agreement"}:
        figures |= _accuracy(run, target, candidate, seed, progress)
    if metrics & {"latency_ratio", "latency_p50_ms", "latency_p95_ms"}:
        ratio = latency.compare(candidate, run.dense, target, seed=seed, limit=limit, progress=progress)
        figures |= {"latency_ratio": ratio, **latency.side_figures(ratio, "candidate")}
    return figures


def _accuracy(run: Run, target: Target, candidate: Path, seed: int, progress: Progress) -> Figures:
    """What the file lost against dense.onnx on the run's validation images, each as it is fed."""
    recipe = parse(read(run.recipe_path), place=str(run.recipe_path))
    if recipe.data is None:
        raise UsageError(f"{run.root}: has no data, so nothing can be said of its accuracy; drop the top1 budgets")
    spec, backbone = recipe.data, run.artifact.backbone
    data = open_data(spec.source, split=spec.split, seed=recipe.seed, limit_val=spec.limit.val)
    data = data.for_classes(backbone.num_classes)
    ours, theirs = (
        measure_accuracy(path, target, data, fed, progress=progress)
        for path, fed in ((candidate, backbone.input), (run.dense, run.dense_input))
    )
    return {
        "top1_drop_points": accuracy.drop(ours, theirs, seed=seed),
        "top1_agreement": accuracy.agreement(ours, theirs),
    }
