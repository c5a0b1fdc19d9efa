"""What the commands do; slim/cli.py says which options they have, and imports this file only to act.

The result goes to stdout, as JSON and nothing else with --json; log lines and progress go to stderr.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import takewhile
from pathlib import Path
from typing import Any

import click
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

from slim import console, environment, job, store
from slim import family as families
from slim.bench import budget, latency, layers_chart, origin, wording
from slim.bench import explain as layers_of
from slim.bench import gate as gates
from slim.bench.measure import measure_accuracy
from slim.bench.report import to_console
from slim.console import stdout
from slim.contract import Fed, Progress, no_progress
from slim.data import open_data
from slim.distributed import is_main
from slim.errors import SlimError, UsageError, did_you_mean
from slim.export.onnx import read_ports
from slim.export.runtime import runtimes
from slim.export.target import Target
from slim.measurement import Measurement
from slim.options import input_of
from slim.passes import PASSES, resolve
from slim.pool import is_list, write_list
from slim.recipe import Recipe
from slim.runs import Run
from slim.served import artifact_in, recipe_of, run_around, served

log = logging.getLogger("slim")


def run(given: Recipe, options: Mapping[str, Any]) -> None:
    """`slim run`."""
    if options["out"] is None:
        raise UsageError("--out is missing: the folder of the run")
    if options["require_gain"] and not any(step.role == "structure" for step in given.passes):
        raise UsageError("--require-gain: the chain has no pass that could gain; add one such as low-rank")
    progress = _progress(quiet=options["quiet"])
    prepared = job.prepare(given, trust=options["trust"])
    finished = job.execute(prepared, options["out"], resume=options["resume"], progress=progress)
    if is_main():
        _print_run(finished, as_json=options["as_json"])
    structures = [step for step in finished.report.steps if step.role == "structure"]
    if options["require_gain"] and all(step.outcome != "kept" for step in structures):
        raise SlimError("--require-gain: no structural stage was kept; the reasons are above")


def dry_run(given: Recipe, *, trust: bool, as_json: bool) -> None:
    """`slim run --dry-run`: check order and inputs, print what would be done."""
    prepared = job.prepare(given, trust=trust)
    data, backbone, guard = prepared.start.data, prepared.start.artifact.backbone, given.guard
    splits = {name: len(split) for name, split in data.splits.items()} if data else {}
    if as_json:
        forecasts = list(prepared.forecasts)
        click.echo(json.dumps({"recipe": given.resolved(), "splits": splits, "forecasts": forecasts}))
        return
    head = " (new head)" if prepared.start.fresh_head else ""
    size = "x".join(map(str, backbone.input.size))
    images = ", ".join(f"{count} {name}" for name, count in splits.items())
    limits = f"max drop {guard.max_drop:g} points, min gain {guard.min_gain:g} %" if guard.on else "off"
    console.tell("model", f"{backbone.name}, {backbone.num_classes} classes{head}, input {size}")
    console.tell("data", f"{data.source}: {images}" if data else "none: accuracy will not be measured")
    console.tell("target", str(prepared.target or "none: latency will not be measured"))
    console.tell("guard", limits)
    for number, stage in enumerate(given.pipeline().stages(), 1):
        for position, step in stage:
            words = _settings(step.model_dump(mode="json", exclude_defaults=True))
            console.tell(f"stage {number}", f"{position} {step.name} ({step.role}): {words}")
            for name, value in prepared.forecasts[position - 1].items():
                console.tell("", f"  {_expected(name, value)}")
    console.tell("export", given.export.format if given.export else "none")
    stdout.print("Order and inputs can work; nothing was done.")


def _expected(name: str, value: Any) -> str:
    """`teacher macs 75.1 M`: a figure of a forecast, scaled by the unit that ends its name."""
    unit = name.rpartition("_")[2]
    if unit not in ("macs", "params", "bytes"):
        return f"{name.replace('_', ' ')} {value}"
    return f"{name.replace('_', ' ')} {wording.number(Measurement(metric=name, value=value, unit=unit))}"


def show(folder: Path, *, trust: bool, as_json: bool) -> None:
    """`slim show`: lineage."""
    artifact, found = artifact_in(folder, trust=trust)
    backbone = artifact.backbone
    if as_json:
        history = [step.model_dump(mode="json") for step in artifact.history]
        built = backbone.model_dump(mode="json")
        click.echo(json.dumps({"backbone": built, "digest": artifact.digest, "history": history}))
        return
    arguments = f"({_settings(backbone.kwargs)})" if backbone.kwargs else ""
    console.tell("model", f"{backbone.name}{arguments}, {backbone.num_classes} classes")
    console.tell("input", _settings(backbone.input.model_dump(mode="json")))
    console.tell("traits", ", ".join(sorted(store.traits(artifact))))
    console.tell("digest", artifact.digest)
    table = Table("step", "version", "settings", "seed", "input", "output", box=None, pad_edge=False)
    for number, step in enumerate(artifact.history, 1):
        changed = resolve(step.name)(**step.config).model_dump(mode="json", exclude_defaults=True)
        table.add_row(
            f"{number} {step.name}" + ("" if step.guard else " (guard off)"),
            str(step.version),
            escape(_settings(changed)),
            str(step.seed),
            step.digests["input"][:12],
            step.digests["output"][:12],
        )
    if artifact.history:
        stdout.print(table)
    if found and (found.root / "report.json").is_file():
        stdout.print()
        stdout.print(to_console(found.report))


def explain(folder: Path, out: Path, *, trust: bool, as_json: bool) -> None:
    """`slim explain`: a row and a bar for each layer of the network before compression."""
    if out.suffix != ".svg":
        raise UsageError(f"--out {out}: the picture is an .svg file; name it so")
    artifact, found = artifact_in(folder, trust=trust)
    leading = tuple(takewhile(lambda step: resolve(step.name).role == "repair", artifact.history))
    lies_in = found or run_around(folder, trust=trust)
    before = origin.before_compression(artifact, len(leading), lies_in)
    dense = before.model() if before else store.replay(artifact.backbone, leading, trust=trust)
    fed = (before or artifact).backbone.input
    rows = layers_of.layers(artifact, Fed(dense, fed), valued=before is not None)
    if not rows:
        raise UsageError(f"{folder}: {artifact.backbone.name} has no Linear layer and no convolution to explain")
    kernels = "as before compression" if before else "as they are now: those before are not at hand"
    title = f"{artifact.backbone.name}: what was decided for each layer"
    store.write_text(out, layers_chart.to_svg(rows, title, f"kernels {kernels}"))
    if as_json:
        listing = [{**row.model_dump(mode="json"), "kept": row.kept, "kind": row.kind} for row in rows]
        click.echo(json.dumps({"kernels": kernels, "picture": str(out), "layers": listing}))
        return
    stdout.print(layers_of.to_console(rows))
    console.tell("kernels", kernels)
    console.tell("picture", str(out))


def evaluate(path: Path, *, as_json: bool, quiet: bool, trust: bool, **options: Any) -> None:
    """`slim eval`: accuracy of an exported file."""
    progress = _progress(quiet=quiet)
    file = served(path, trust=trust)
    spec = recipe_of(file.run).data if file.run else None
    seed = recipe_of(file.run).seed if file.run else 0
    if options["data"]:
        opened = open_data(options["data"], split=options["split"], seed=seed)
    elif spec is not None:  # the very images of the run's report
        opened = open_data(spec.source, split=options["split"] or spec.split, seed=seed, limit_val=spec.limit.val)
    else:
        raise UsageError(f"{path}: --data is missing, and the file belongs to no run that has images")
    preprocessing = file.preprocessing(input_of(options))
    classes = read_ports(file.path)[1][0].shape[1]
    if not isinstance(classes, int):
        raise UsageError(f"{path}: its output has no fixed number of classes: {classes}")
    target = Target.parse(options["target"] or file.target)
    found = measure_accuracy(file.path, target, opened.for_classes(classes), preprocessing, progress=progress)
    _print_figures([Figure(str(path), found)], as_json=as_json)


@dataclass(frozen=True)
class Figure:
    """What was measured of a file, against another one where it is a comparison."""

    file: str
    measurement: Measurement
    against: str | None = None


def bench(paths: Sequence[Path], targets: Sequence[str], *, seed: int, as_json: bool, quiet: bool) -> None:
    """`slim bench`: latency of each file, and the ratio of each to the first."""
    progress = _progress(quiet=quiet)
    files = [served(path) for path in paths]
    figures = []
    for target in [Target.parse(text) for text in targets or (files[0].target,)]:
        if len(files) == 1:
            alone = latency.latency(files[0].path, target, seed=seed, progress=progress)
            figures.append(Figure(str(paths[0]), alone))
        for path, file in zip(paths[1:], files[1:], strict=True):
            ratio = latency.compare(file.path, files[0].path, target, seed=seed, progress=progress)
            ours, theirs = (latency.side_figures(ratio, side)["latency_p50_ms"] for side in ("candidate", "reference"))
            figures += [Figure(str(paths[0]), theirs), Figure(str(path), ours), Figure(str(path), ratio, str(paths[0]))]
    _print_figures(figures, as_json=as_json)


def gate(
    run_folder: Path,
    budgets: Path,
    *,
    stored: bool,
    allow_inconclusive: bool,
    junit: Path | None,
    markdown: Path | None,
    trust: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """`slim gate`: the exit code of the verdicts."""
    verdicts = gates.gate(run_folder, budgets, stored=stored, trust=trust, progress=_progress(quiet=quiet))
    for path, text in ((junit, budget.to_junit), (markdown, budget.to_markdown)):
        if path:
            store.write_text(path, text(verdicts))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(summary).open("a") as file:
            file.write(budget.to_markdown(verdicts) + "\n")
    dumped = budget.to_json(verdicts, allow_inconclusive=allow_inconclusive)
    click.echo(dumped if as_json else budget.to_console(verdicts))
    return budget.exit_code(verdicts, allow_inconclusive=allow_inconclusive)


def select_unlabeled(
    out: Path, *, pool: Path, teacher: str, as_json: bool, quiet: bool, trust: bool, **options: Any
) -> None:
    """`slim select-unlabeled`: the list of images."""
    from slim.passes.distill import select  # brings ImageHash and scipy, half a second that no other command needs

    progress = _progress(quiet=quiet)
    if out.exists() and not is_list(out):
        raise UsageError(f"--out {out}: exists and is no list of images; choose another place")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}; make it")
    numbers = ("per_class", "max_hamming", "min_cosine")
    rule = select.Rule(**{name: options[name] for name in numbers if options[name] is not None})
    data = open_data(options["data"], split=options["split"], seed=options["seed"])
    images = select.pool_of(pool, data)
    judge = select.teacher_of(teacher, trust=trust)
    reading = {name: options[name] for name in ("batch_size", "workers")}
    found = select.select(images, judge, data, rule, out=out, progress=progress, **reading)
    write_list(out, found.header, found.chosen)
    counts = found.header.counts
    short = [(name, count) for name, count in found.kept if count < rule.per_class]
    if as_json:
        header = found.header.model_dump(mode="json")
        click.echo(json.dumps({"out": str(out), **header, "unreadable": images.unreadable, "short": short}))
        return
    console.tell("pool", f"{counts.pool} images, {counts.unreadable} unreadable")
    console.tell("removed", f"{counts.near_duplicates} near-duplicates of validation images, {counts.repeated} copies")
    console.tell("kept", f"{counts.kept}, at most {rule.per_class} of each of {len(found.kept)} classes")
    if short:
        name, count = min(short, key=lambda one: one[1])
        console.tell("short", f"{len(short)} classes have fewer, the fewest {name!r} with {count}")
    console.tell("list", str(out))


def build_table(folder: Path, out: Path, *, again: bool, trust: bool, as_json: bool, quiet: bool, **given: Any) -> None:
    """`slim table build`: latencies of whole networks, and what is fitted to them."""
    progress = _progress(quiet=quiet)
    options = families.given_by(folder, given, ("target", "seed"))
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}; make it")
    known = options if options.target else options.model_copy(update={"target": "ort:cpu"})
    found = job.prepare(known, trust=trust)
    before = out.read_bytes() if out.is_file() else None
    model = families.table(found, out, again=again, progress=progress)
    kept = out.read_bytes() == before and not again
    if as_json:
        click.echo(json.dumps({"table": str(out), "kept": kept, "said": str(model), **model.as_json()}))
        return
    low, high = (f(row.ms for row in model.rows) for f in (min, max))
    console.tell("measured", f"{len(model.rows)} subnets on {model.origin.target}, {low:.4g} to {high:.4g} ms")
    console.tell("error", str(model))
    console.tell("table", f"{out}, finished before and kept; --again measures again" if kept else str(out))


def family(
    folder: Path, to: str, out: Path, *, resume: bool, trust: bool, as_json: bool, quiet: bool, **given: Any
) -> int:
    """`slim family`: the exit code of the budgets."""
    progress, goals = _progress(quiet=quiet), families.goals_of(to)
    options = families.given_by(folder, given, ("data", "target", "seed", "device", "threads"))
    wishes = families.Wishes(
        settings={name: given[name] for name in ("evaluations", "proposals", "repair")},
        storage=given["storage"] or f"sqlite:///{out.absolute() / 'search.db'}",
        table=(given["table"] or out / "table.json").absolute(),
        polish=given["polish"],
    )
    found = families.prepared(options, folder, trust=trust)
    result = families.cut(found, goals, wishes, out, resume=resume, progress=progress)
    if is_main() and as_json:
        click.echo((out / families.MANIFEST).read_text().rstrip())
    elif is_main():
        stdout.print(families.to_console(result.rows))
        console.tell("runs", ", ".join(row.folder for row in result.rows if row.folder) or "none")
        if result.front is not None:
            console.tell("picture", str(out / "front.svg"))
    return result.exit_code


def doctor(*, as_json: bool) -> None:
    """`slim doctor`: what is here."""
    import torch

    targets = {name: str(runtime.probe()) for name, runtime in runtimes().items()}
    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    here = {**environment.describe(), "cuda_devices": cuda, "targets": targets}
    if as_json:
        click.echo(json.dumps(here))
        return
    device = here["device"]
    console.tell("cpu", f"{device['cpu']}, {device['cores']} cores, {' '.join(device['isa'])}")
    console.tell("cuda", ", ".join(cuda) or "none")
    console.tell("device", f"fingerprint {here['fingerprint']}, load {here['load_average']}")
    console.tell("versions", ", ".join(f"{name} {version}" for name, version in here["versions"].items()))
    for name, state in targets.items():
        console.tell(name, state)


def passes(card: str | None, *, as_json: bool) -> None:
    """`slim passes`: the table, or one card."""
    if card is None:
        listing = {name: text for name, (_, _, text) in PASSES.items()}
        if as_json:
            click.echo(json.dumps(listing))
            return
        for name, text in listing.items():
            console.tell(name, text)
        return
    if card not in PASSES:
        raise UsageError(f"--card {card}: no such pass{did_you_mean(card, PASSES)}")
    module = PASSES[card][0].rpartition(".")[2]
    text = (resources.files("slim.passes") / f"{module}.md").read_text()
    if as_json:
        click.echo(json.dumps({"pass": card, "card": text}))
    else:
        stdout.print(Markdown(text))


def demo(out: Path, *, as_json: bool, quiet: bool) -> None:
    """`slim demo`: the main job on the embedded digits, then a gate."""
    from slim import demo as example

    progress = _progress(quiet=quiet)
    finished = job.execute(job.prepare(example.recipe()), out, resume=out.exists(), progress=progress)
    if not is_main():
        return
    budgets = out / "budgets.yaml"
    store.write_text(budgets, example.BUDGETS)
    verdicts = gates.gate(out, budgets, stored=True)
    if as_json:
        judged = json.loads(budget.to_json(verdicts))
        click.echo(json.dumps({"report": finished.report.model_dump(mode="json"), "gate": judged}))
    else:
        _print_run(finished, as_json=False)
        click.echo("\n" + budget.to_console(verdicts))
    if code := budget.exit_code(verdicts):
        raise click.exceptions.Exit(code)


def _progress(*, quiet: bool) -> Progress:
    """Log lines and progress on stderr, or neither."""
    console.show_log(quiet=quiet)
    return no_progress if quiet else console.bars


def _print_run(finished: Run, *, as_json: bool) -> None:
    report = finished.report
    if as_json:
        click.echo(report.model_dump_json())
        return
    stdout.print(to_console(report))
    console.tell("report", str(finished.root / "report.html"))
    if report.file:
        console.tell("bundle", str(finished.bundle))


def _print_figures(figures: Sequence[Figure], *, as_json: bool) -> None:
    if as_json:
        rows = [
            {"file": one.file, "against": one.against, "measurement": one.measurement.model_dump(mode="json")}
            for one in figures
        ]
        click.echo(json.dumps(rows))
        return
    several = len({one.measurement.target for one in figures}) > 1
    for one in figures:
        name = f"{one.file} / {one.against}" if one.against else one.file
        where = f" on {one.measurement.target}" if several else ""
        stdout.print(f"{escape(name)}{where}  {one.measurement}{_verdict(one)}", soft_wrap=True)


def _verdict(one: Figure) -> str:
    """What a comparison comes to."""
    if one.against is None:
        return ""
    if not one.measurement.details["control"]["fit"]:
        return ": no verdict, the first file against itself differs; quieten this machine"
    if not latency.differs(one.measurement):
        return ": no clear difference"
    return ": faster" if one.measurement.value < 1 else ": slower"


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in values.items()) or "defaults"
