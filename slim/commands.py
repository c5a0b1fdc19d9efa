"""What the commands do; slim/cli.py says which options they have, and imports this file only to act."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from slim import cli, console, environment, job, recipe, store
from slim.artifact import Preprocessing
from slim.bench import budget, latency
from slim.bench import gate as gates
from slim.bench.measure import measure_accuracy, noise
from slim.bench.report import to_console
from slim.contract import Pass, no_progress
from slim.data import open_data
from slim.distributed import is_main
from slim.errors import MissingExtra, OrderError, RecipeError, SlimError, UsageError, did_you_mean
from slim.export.bundle import write_bundle
from slim.export.onnx import export_onnx, read_ports
from slim.export.parity import parity
from slim.export.target import RUNTIMES, Target
from slim.measurement import Measurement
from slim.passes import PASSES
from slim.recipe import Recipe
from slim.runs import Run, open_run

stdout = Console()


def recipe_of(chain: Sequence[Pass | dict[str, str]], options: Mapping[str, Any]) -> Recipe:
    """The recipe that the options and the chain of `slim run` say together.

    Raises:
        RecipeError: a value that cannot be, or a chain both in the file and on the command line.
        OrderError: `export` that is not last.
    """
    file: Path | None = options["recipe_file"]
    values = recipe.read(file) if file else {}
    cli.place(values, options)
    if options["model_args"]:
        values.setdefault("model", {}).setdefault("args", {})
        for assignment in options["model_args"]:
            recipe.assign(values["model"]["args"], assignment)
    if options["no_guard"]:
        values.setdefault("guard", {})["on"] = False
    ends = [number for number, step in enumerate(chain) if isinstance(step, dict)]
    if ends and ends != [len(chain) - 1]:
        raise OrderError("'export' ends the chain, and something follows it; put one export, last")
    if ends:
        values["export"] = chain[-1]
    steps = [step for step in chain if not isinstance(step, dict)]
    if steps:
        if values.get("passes"):
            raise RecipeError(f"{file}: has passes, and so has the command line; give the chain in one place")
        values["passes"] = tuple(steps)
    for assignment in options["assignments"]:
        recipe.assign(values, assignment)
    if "model" not in values:
        raise UsageError("--model is missing: the network to compress, by its timm name; see `slim run --help`")
    return recipe.parse(values, place=str(file) if file else "command line")


def run(given: Recipe, options: Mapping[str, Any]) -> None:
    """`slim run`."""
    if options["out"] is None:
        raise UsageError("--out is missing: the folder of the run")
    quiet = options["quiet"]
    console.show_log(quiet=quiet)
    progress = no_progress if quiet else console.bars
    prepared = job.prepare(given, trust=options["trust"])
    finished = job.execute(prepared, options["out"], resume=options["resume"], progress=progress)
    _print_run(finished, as_json=options["as_json"])
    structures = [step for step in finished.report.steps if step.role == "structure"]
    if options["require_gain"] and all(step.outcome != "kept" for step in structures):
        raise SlimError("--require-gain: no structural stage was kept; the reasons are above")


def dry_run(given: Recipe, *, trust: bool, as_json: bool) -> None:
    """`slim run --dry-run`: check order and inputs, print what would be done."""
    prepared = job.prepare(given, trust=trust)
    data, backbone = prepared.start.data, prepared.start.artifact.backbone
    splits = {name: len(split) for name, split in data.splits.items()} if data else {}
    if as_json:
        click.echo(json.dumps({"recipe": given.resolved(), "splits": splits}))
        return
    head = " (new head)" if prepared.start.fresh_head else ""
    stdout.print(f"model   {backbone.name}, {backbone.num_classes} classes{head}, input {backbone.input.size}")
    stdout.print(f"data    {data.source if data else 'none: accuracy will not be measured'} {splits or ''}")
    stdout.print(f"target  {prepared.target or 'none: latency will not be measured'}")
    guard = given.guard
    stdout.print(
        f"guard   max drop {guard.max_drop:g} points, min gain {guard.min_gain:g} %" if guard.on else "guard   off"
    )
    for number, stage in enumerate(given.pipeline().stages(), 1):
        for position, step in stage:
            changed = step.model_dump(mode="json", exclude_defaults=True)
            words = ", ".join(f"{key}={value}" for key, value in changed.items()) or "defaults"
            stdout.print(f"stage {number}  {position}. {step.name} ({step.role}): {words}", highlight=False)
    stdout.print(f"export  {given.export.format if given.export else 'none'}")
    stdout.print("Order and inputs can work. Nothing was done.")


def show(folder: Path, *, as_json: bool) -> None:
    """`slim show`: lineage."""
    artifact = store.load(folder / "final" if (folder / "recipe.yaml").is_file() else folder, trust=False)
    if as_json:
        history = [step.model_dump(mode="json") for step in artifact.history]
        built = artifact.backbone.model_dump(mode="json")
        click.echo(json.dumps({"backbone": built, "digest": artifact.digest, "history": history}))
        return
    backbone = artifact.backbone
    stdout.print(f"{backbone.name}  {backbone.num_classes} classes  input {backbone.input.size}", highlight=False)
    table = Table("step", "version", "settings", "seed", "input", "output")
    for number, step in enumerate(artifact.history, 1):
        settings = ", ".join(f"{key}={value}" for key, value in step.config.items())
        table.add_row(
            f"{number} {step.name}" + ("" if step.guard else " (guard off)"),
            str(step.version),
            settings,
            str(step.seed),
            step.digests["input"][:12],
            step.digests["output"][:12],
        )
    stdout.print(table)
    stdout.print(f"traits {', '.join(sorted(store.traits(artifact)))}; digest {artifact.digest[:12]}", highlight=False)
    if (folder / "report.json").is_file():
        stdout.print(to_console(Run(folder).report))


@dataclass(frozen=True)
class Served:
    """An exported file, and what is known of it."""

    path: Path
    preprocessing: Preprocessing
    run: Run | None
    """The run it belongs to, none for a plain file."""


def served(path: Path) -> Served:
    """The file a run serves, or a plain .onnx file; one in a run or bundle is fed as that run's network is.

    Raises:
        UsageError: neither a run nor an .onnx file.
    """
    if path.suffix == ".onnx":
        if not path.is_file():
            raise UsageError(f"{path}: no such file")
        for parent in (path.parent, path.parent.parent):
            if (parent / "recipe.yaml").is_file():
                return Served(path, Run(parent).artifact.backbone.input, Run(parent))
        size = read_ports(path)[0][0].shape[1:]
        return Served(path, Preprocessing.model_validate({"size": size}), None)
    found = open_run(path)
    file = found.bundle / "model.onnx"
    if not file.is_file():
        raise UsageError(f"{path}: has no bundle; `slim export {path} --out {found.bundle}` writes it")
    return Served(file, found.artifact.backbone.input, found)


def evaluate(
    path: Path, *, data: str | None, split: str | None, target: str | None, as_json: bool, quiet: bool
) -> None:
    """`slim eval`: accuracy of an exported file."""
    file = served(path)
    spec = _recipe_of_run(file.run).data if file.run else None
    source = data or (spec.source if spec else None)
    if source is None:
        raise UsageError(f"{path}: --data is missing, and the file belongs to no run that has one")
    split = split if data or split else (spec.split if spec else None)
    opened = open_data(source, split=split, seed=_recipe_of_run(file.run).seed if file.run else 0)
    classes = read_ports(file.path)[1][0].shape[1]
    if not isinstance(classes, int):
        raise UsageError(f"{path}: its output has no fixed number of classes: {classes}")
    found = measure_accuracy(
        file.path,
        _target(target, file.run),
        opened.for_classes(classes),
        file.preprocessing,
        progress=no_progress if quiet else console.bars,
    )
    _print_figures({str(path): found}, as_json=as_json)


def bench(paths: Sequence[Path], targets: Sequence[str], *, seed: int, as_json: bool, quiet: bool) -> None:
    """`slim bench`: latency of each file, and the ratio of each to the first."""
    files = [served(path) for path in paths]
    progress = no_progress if quiet else console.bars
    figures: dict[str, Measurement] = {}
    for target in [Target.parse(text) for text in targets] or [_target(None, files[0].run)]:
        where = f" on {target}" if len(targets) > 1 else ""
        if len(files) == 1:
            figures[f"{paths[0]}{where}"] = latency.latency(files[0].path, target, seed=seed, progress=progress)
        for path, file in zip(paths[1:], files[1:], strict=True):
            ratio = latency.compare(file.path, files[0].path, target, seed=seed, progress=progress)
            figures[f"{path} / {paths[0]}{where}"] = ratio
            figures[f"{path}{where}"] = latency.side_figures(ratio, "candidate")["latency_p50_ms"]
            figures[f"{paths[0]}{where}"] = latency.side_figures(ratio, "reference")["latency_p50_ms"]
    _print_figures(figures, as_json=as_json)


def export(folder: Path, format_: str, out: Path, *, trust: bool, as_json: bool) -> None:
    """`slim export`: the bundle of a run or an artifact."""
    recipe.parse({"model": "any", "export": {"format": format_}}, place="slim export")
    if out.exists():
        raise UsageError(f"--out {out}: exists; choose another place")
    is_run = (folder / "recipe.yaml").is_file()
    artifact = store.load(folder / "final" if is_run else folder, trust=trust)
    figures = dict(Run(folder).report.final) if is_run and (folder / "report.json").is_file() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.onnx"
    try:
        file = export_onnx(artifact.model(), partial, artifact.backbone.input)
        figures["parity_max_abs"] = parity(
            artifact.model(), file.path, noise(artifact.backbone.input), target=Target.parse("ort:cpu")
        )
        write_bundle(out, artifact, file, figures)
    finally:
        partial.unlink(missing_ok=True)
    click.echo(json.dumps({"bundle": str(out), "sha256": file.sha256}) if as_json else f"Bundle in {out}")


def gate(
    run_folder: Path,
    budgets: Path,
    *,
    stored: bool,
    allow_inconclusive: bool,
    junit: Path | None,
    markdown: Path | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """`slim gate`: the exit code of the verdicts."""
    verdicts = gates.gate(run_folder, budgets, stored=stored, progress=no_progress if quiet else console.bars)
    for path, text in ((junit, budget.to_junit), (markdown, budget.to_markdown)):
        if path:
            store.write_text(path, text(verdicts))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(summary).open("a") as file:
            file.write(budget.to_markdown(verdicts))
    dumped = budget.to_json(verdicts, allow_inconclusive=allow_inconclusive)
    click.echo(dumped if as_json else budget.to_console(verdicts))
    return budget.exit_code(verdicts, allow_inconclusive=allow_inconclusive)


def doctor(*, as_json: bool) -> None:
    """`slim doctor`: what is here."""
    import torch

    targets = {}
    for name in RUNTIMES:
        try:
            targets[name] = f"ready, {Target.parse(name).probe()}"
        except MissingExtra as error:
            targets[name] = f"missing: {error}"
    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    here = {**environment.describe(), "cuda_devices": cuda, "targets": targets}
    if as_json:
        click.echo(json.dumps(here))
        return
    device = here["device"]
    stdout.print(f"cpu       {device['cpu']}, {device['cores']} cores, {' '.join(device['isa'])}", highlight=False)
    stdout.print(f"cuda      {', '.join(cuda) or 'none'}", highlight=False)
    stdout.print(f"device    fingerprint {here['fingerprint']}, load {here['load_average']}", highlight=False)
    stdout.print(
        f"versions  {', '.join(f'{name} {version}' for name, version in here['versions'].items())}", highlight=False
    )
    for name, state in targets.items():
        stdout.print(f"{name:<9} {state}", highlight=False)


def passes(card: str | None, *, as_json: bool) -> None:
    """`slim passes`: the table, or one card."""
    if card is None:
        listing = {name: text for name, (_, _, text) in PASSES.items()}
        click.echo(
            json.dumps(listing) if as_json else "\n".join(f"{name:<10} {text}" for name, text in listing.items())
        )
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

    console.show_log(quiet=quiet)
    progress = no_progress if quiet else console.bars
    prepared = job.prepare(example.recipe())
    finished = job.execute(prepared, out, resume=out.exists(), progress=progress)
    if is_main():
        store.write_text(out / "budgets.yaml", example.BUDGETS)
    _print_run(finished, as_json=as_json)
    code = gate(
        out,
        out / "budgets.yaml",
        stored=True,
        allow_inconclusive=False,
        junit=None,
        markdown=None,
        as_json=as_json,
        quiet=quiet,
    )
    if code:
        raise click.exceptions.Exit(code)


def _print_run(finished: Run, *, as_json: bool) -> None:
    if not is_main():
        return
    report = finished.report
    if as_json:
        click.echo(report.model_dump_json())
        return
    stdout.print(to_console(report))
    stdout.print(f"report  {finished.root / 'report.html'}", highlight=False, soft_wrap=True)
    if report.file:
        stdout.print(f"bundle  {finished.bundle}", highlight=False, soft_wrap=True)


def _print_figures(figures: Mapping[str, Measurement], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({name: figure.model_dump(mode="json") for name, figure in figures.items()}))
        return
    for name, figure in figures.items():
        stdout.print(f"{name}  {figure}", highlight=False, soft_wrap=True)


def _recipe_of_run(found: Run | None) -> Recipe:
    assert found is not None  # callers ask for files of a run only
    return recipe.parse(recipe.read(found.recipe_path), place=str(found.recipe_path))


def _target(text: str | None, found: Run | None) -> Target:
    stored = _recipe_of_run(found).target if found else None
    return Target.parse(text or stored or "ort:cpu")
