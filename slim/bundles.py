"""What `slim export` and `slim bundle verify` do: write a bundle, with engines where asked for, and look one over."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
from torch import Tensor

from slim import console, environment, recipe
from slim.artifact import Artifact
from slim.bench.measure import TargetMeter
from slim.data import open_data
from slim.errors import DataError, TargetError, UsageError
from slim.export.bundle import write_bundle
from slim.export.bundle_files import add_engine
from slim.export.bundle_verify import as_json as checks_as_json
from slim.export.bundle_verify import verify
from slim.export.engine import read_sidecar
from slim.export.golden import golden_images
from slim.export.target import Target
from slim.measurement import Measurement
from slim.recipe import Recipe
from slim.runs import Run
from slim.served import artifact_in, recipe_of

log = logging.getLogger("slim")


def export(
    folder: Path,
    format_: str,
    out: Path,
    *,
    targets: Sequence[str],
    uint8_input: bool,
    trust: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """`slim export`: the bundle of a run or an artifact, with the file that the run's target serves, and engines."""
    console.show_log(quiet=quiet)
    recipe.parse({"model": "any", "export": {"format": format_}}, place="slim export")
    if out.exists():
        raise UsageError(f"--out {out}: exists; choose another place")
    engines = [_building(Target.parse(text)) for text in targets]
    artifact, found = artifact_in(folder, trust=trust)
    known = recipe_of(found) if found else None
    target = Target.parse(known.target) if known and known.target else None
    images = _golden_of(known, artifact) if known else None
    with tempfile.TemporaryDirectory(prefix="slim-") as beside:
        file = TargetMeter(target or Target.parse("ort:cpu"), None, Path(beside)).export(artifact)
        figures = _measured_before(found)
        write_bundle(out, artifact, file, figures, target=target, images=images, uint8_input=uint8_input)
        for engine in engines:
            served = TargetMeter(engine, None, Path(beside)).export(artifact)
            plan = engine.on.build(served, artifact.model, Path(beside), engine)
            added = add_engine(out, plan.read_bytes(), read_sidecar(plan.parent))
            log.info("%s: engine in %s; %s", engine.name, added.parent, engine.on.probe())
    click.echo(json.dumps({"bundle": str(out), "sha256": file.sha256}) if as_json else f"Bundle in {out}")


def _building(target: Target) -> Target:
    """`target`, once it is known that engines for it are built, and can be here."""
    state = target.on.probe()
    if not target.on.builds:
        raise UsageError(f"--target {target}: builds no engine, it is served the bundle's files; leave it out")
    if state.level not in ("ready", "build only"):
        raise TargetError(f"--target {target}: {state}")
    return target


def verify_bundle(folder: Path, *, as_json: bool) -> int:
    """`slim bundle verify`: 1 where anything is wrong, else 0."""
    checks = verify(folder)
    if as_json:
        click.echo(json.dumps(checks_as_json(checks)))
    for check in () if as_json else checks:
        console.tell(check.name, check.said if not check.faults else f"{check.said}; {len(check.faults)} wrong")
    for fault in (fault for check in checks for fault in check.faults):
        click.echo(f"Error: {folder}: {' '.join(fault.split())}", err=True)
    return int(any(check.faults for check in checks))


def _golden_of(known: Recipe, artifact: Artifact) -> Tensor | None:
    """Images of the run, where its data is still at hand."""
    if (spec := known.data) is None:
        return None
    try:
        data = open_data(
            spec.source,
            split=spec.split,
            calib=spec.calib,
            seed=known.seed,
            limit_train=spec.limit.train,
            limit_val=spec.limit.val,
        )
    except DataError as error:
        log.warning("%s; golden inputs are noise", error)
        return None
    return golden_images(data, artifact.backbone.input)


def _measured_before(found: Run | None) -> dict[str, Measurement]:
    """Figures of the run's report, where the same exporter writes the same file again, to the last byte."""
    if found is None or not (found.root / "report.json").is_file():
        return {}
    same = found.report.environment.get("versions") == environment.versions()
    return dict(found.report.final) if same else {}
