"""The command line. Importing it loads click alone: `slim --help` needs neither torch nor timm.

The options of a pass are read off its fields, and the chain is a click group of such commands: each returns its pass
and does nothing; the end of the chain acts.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import click

from slim import __version__
from slim.errors import EXIT_INTERRUPTED, SlimError, UsageError, did_you_mean

if TYPE_CHECKING:
    from slim.contract import Pass

EXIT_CODES = """\b
Exit codes:
  0    done, every budget kept          4    a budget could not be decided
  1    failure                          5    target missing, or not the budget's device
  2    option, recipe, data or order    6    exported file differs from the network
  3    budget missed                    130  interrupted"""

PLACES = {
    "model": "model.name",
    "weights": "model.weights",
    "input_size": "model.input.size",
    "mean": "model.input.mean",
    "std": "model.input.std",
    "crop": "model.input.crop",
    "interpolation": "model.input.interpolation",
    "data": "data.source",
    "split": "data.split",
    "unlabeled": "data.unlabeled",
    "calib": "data.calib",
    "batch_size": "data.batch_size",
    "workers": "data.workers",
    "limit_train": "data.limit.train",
    "limit_val": "data.limit.val",
    "target": "target",
    "seed": "seed",
    "device": "device",
    "threads": "threads",
    "max_drop": "guard.max_drop",
    "min_gain": "guard.min_gain",
}
"""Option of `slim run` -> its place in a recipe."""


class Suggesting(click.Group):
    """A group that says which command an unknown one was meant to be."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Click's, with the nearest known name in the error."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            kind = "pass" if isinstance(self, Chain) else "command"
            ctx.fail(f"{kind} {args[0]!r} is unknown{did_you_mean(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


class Chain(Suggesting):
    """`slim run`: its commands are the passes, then `export`; a pass is imported only when it is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every pass, and `export`."""
        from slim.passes import PASSES

        return [*PASSES, "export"]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command of a pass, made from its fields."""
        from slim.passes import PASSES, resolve

        if name == "export":
            return export_end
        return pass_command(resolve(name)) if name in PASSES else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of passes, without importing one."""
        from slim.passes import PASSES

        rows = [*((name, text) for name, (_, _, text) in PASSES.items()), ("export", "Write the bundle; comes last.")]
        with formatter.section("Passes, chained in this order or any other that can work"):
            formatter.write_dl(rows)


@click.group(cls=Suggesting, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="slim")
def cli() -> None:
    """Compress vision backbones, judged in milliseconds on the runtime they are served on."""


def shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--json` and `--quiet`, which every command has."""
    command = click.option("--quiet", is_flag=True, help="Say nothing but the result and errors.")(command)
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


@cli.group(cls=Chain, chain=True, invoke_without_command=True, epilog=EXIT_CODES)
@click.option("-f", "recipe_file", type=click.Path(path_type=Path), help="Recipe to run; options override it.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="passes.1.energy=0.9; counts from 0.")
@click.option("--model", help="timm model name, or package.module:factory with --trust.")
@click.option("--model-arg", "model_args", multiple=True, metavar="KEY=VALUE", help="Argument of the timm model.")
@click.option("--weights", help="pretrained (default), none, or a .safetensors file.")
@click.option("--mean", metavar="R,G,B", help="Overrides timm's data config, as do the next four.")
@click.option("--std", metavar="R,G,B")
@click.option("--crop", type=float)
@click.option("--interpolation")
@click.option("--input-size", metavar="PIXELS|C,H,W")
@click.option("--data", help="digits, folder:/path, tar:/path or torchvision:NAME@/path.")
@click.option("--split", metavar="train=0.8,val=0.2", help="Cuts class folders that have no train and val.")
@click.option("--unlabeled", metavar="FOLDER", help="Plain images.")
@click.option("--calib", type=int, help="Images set aside for calibration.")
@click.option("--batch-size", type=int, help="Images of one optimiser step, over all processes.")
@click.option("--workers", type=int, help="Reader processes.")
@click.option("--limit-train", type=int, help="Use only so many training images.")
@click.option("--limit-val", type=int, help="Use only so many validation images.")
@click.option("--target", metavar="RUNTIME[:DEVICE][,threads=N,batch=N]", help="Where it will be served.")
@click.option("--device", help="Where training computes: auto, cpu or cuda.")
@click.option("--threads", type=int, help="CPU threads of torch.")
@click.option("--seed", type=int)
@click.option("--max-drop", type=float, metavar="POINTS", help="Largest loss of top-1 in one stage.")
@click.option("--min-gain", type=float, metavar="PERCENT", help="Least latency a structural pass must save.")
@click.option("--no-guard", is_flag=True, help="Keep every stage whatever it costs.")
@click.option("--require-gain", is_flag=True, help="End with 1 when every structural stage was rolled back.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@click.option("--trust", is_flag=True, help="Import a package.module:factory model.")
@click.option("--dry-run", is_flag=True, help="Check order and inputs, print the plan, do nothing.")
@click.option("--emit-yaml", is_flag=True, help="Print the recipe, do nothing.")
@shared
def run(**options: Any) -> None:
    r"""Send a network through a chain of passes and measure what comes out.

    \b
    slim run --model resnet50 --data folder:/data --target ort:cpu --out runs/r50 \
        low-rank --energy 0.9  finetune --epochs 10  export --format onnx
    """


@run.result_callback()
def act(chain: list[Any], **options: Any) -> None:
    """The end of the chain: builds the recipe, then does what was asked."""
    from slim import commands

    recipe = commands.recipe_of(chain, options)
    if options["emit_yaml"]:
        click.echo(recipe.to_yaml(), nl=False)
    elif options["dry_run"]:
        commands.dry_run(recipe, trust=options["trust"], as_json=options["as_json"])
    else:
        commands.run(recipe, options)


@click.command("export")
@click.option("--format", "format_", default="onnx", show_default=True, help="onnx.")
def export_end(format_: str) -> dict[str, str]:
    """Write the bundle: the exported file and everything needed to serve it. Comes last."""
    return {"format": format_}


def pass_command(pass_class: type[Pass]) -> click.Command:
    """The command of a pass: one option for each field, none of them with a default of its own."""
    from slim.recipe import build_pass

    def build(**given: Any) -> Pass:
        return build_pass(pass_class, {name: value for name, value in given.items() if value not in (None, ())})

    options: list[click.Parameter] = [_option(name, info) for name, info in pass_class.model_fields.items()]
    text = (pass_class.__doc__ or "").strip()
    return click.Command(pass_class.name, callback=build, params=options, help=text, short_help=text.split("\n")[0])


def _option(name: str, info: Any) -> click.Option:
    annotation = info.annotation
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(part for part in get_args(annotation) if part is not NoneType)
    flag = "--" + name.replace("_", "-")
    default = "none" if info.default is None else info.default
    text = f"{info.description} [default: {default if default != () else 'none'}]"
    if annotation is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}"], default=None, help=text)
    if get_origin(annotation) is tuple:
        return click.Option([flag], multiple=True, help=text)
    if get_origin(annotation) is Literal:
        return click.Option([flag], type=click.Choice(get_args(annotation)), help=text)
    return click.Option([flag], type=annotation if annotation in (int, float) else str, help=text)


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True)
@shared
def demo(out: Path, as_json: bool, quiet: bool) -> None:
    """The whole road in a few minutes: handwritten digits, a small network, one stage kept, one rolled back."""
    from slim import commands

    commands.demo(out, as_json=as_json, quiet=quiet)


@cli.command()
@click.argument("run_folder", type=click.Path(path_type=Path))
@shared
def show(run_folder: Path, as_json: bool, quiet: bool) -> None:
    """Lineage of a run or an artifact: its backbone, its steps, their digests and figures."""
    from slim import commands

    commands.show(run_folder, as_json=as_json)


@cli.command("eval")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--data", help="Images, for a plain .onnx file, or others than the run's.")
@click.option("--split")
@click.option("--target", default=None)
@shared
def evaluate(file: Path, data: str | None, split: str | None, target: str | None, as_json: bool, quiet: bool) -> None:
    """Accuracy of a run's file, or of any .onnx file that lies in a bundle or run."""
    from slim import commands

    commands.evaluate(file, data=data, split=split, target=target, as_json=as_json, quiet=quiet)


@cli.command("bench")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--target", "targets", multiple=True, help="May be given more than once.")
@click.option("--seed", type=int, default=0, show_default=True)
@shared
def bench(files: tuple[Path, ...], targets: tuple[str, ...], seed: int, as_json: bool, quiet: bool) -> None:
    """Latency of runs or .onnx files; a second one is compared with the first, paired in one run."""
    from slim import commands

    commands.bench(files, targets, seed=seed, as_json=as_json, quiet=quiet)


@cli.command("export")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--format", "format_", default="onnx", show_default=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the bundle.")
@click.option("--trust", is_flag=True)
@shared
def export(folder: Path, format_: str, out: Path, trust: bool, as_json: bool, quiet: bool) -> None:
    """Write the bundle of a run or an artifact."""
    from slim import commands

    commands.export(folder, format_, out, trust=trust, as_json=as_json)


@cli.command()
@click.argument("run_folder", type=click.Path(path_type=Path))
@click.option("--budgets", required=True, type=click.Path(path_type=Path), help="budgets.yaml")
@click.option("--stored", is_flag=True, help="Judge the figures of report.json instead of measuring again.")
@click.option("--allow-inconclusive", is_flag=True, help="End with 0 when a budget could not be decided.")
@click.option("--junit", type=click.Path(path_type=Path), help="Write a JUnit file.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write a Markdown file.")
@shared
def gate(run_folder: Path, budgets: Path, **options: Any) -> None:
    """Exit 0 if every budget is kept; else say which was missed, and by how much."""
    from slim import commands

    sys.exit(commands.gate(run_folder, budgets, **options))


@cli.command()
@shared
def doctor(as_json: bool, quiet: bool) -> None:
    """Which runtimes, versions, devices and cores are here."""
    from slim import commands

    commands.doctor(as_json=as_json)


@cli.command("passes")
@click.option("--card", metavar="PASS", help="Print the method card of one pass.")
@shared
def passes(card: str | None, as_json: bool, quiet: bool) -> None:
    """Every pass; with --card what one does, its figures and its limits."""
    from slim import commands

    commands.passes(card, as_json=as_json)


@cli.command()
@shared
def schema(as_json: bool, quiet: bool) -> None:
    """JSON schema of a recipe."""
    from slim.recipe import schema as recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=1))


def place(values: dict[str, Any], options: Mapping[str, Any]) -> None:
    """Put the options of `slim run` that were given where a recipe has them."""
    for option, path in PLACES.items():
        value = options.get(option)
        if value is None:
            continue
        section = values
        *parents, last = path.split(".")
        for parent in parents:
            inner = section.get(parent)
            if isinstance(inner, str):  # `model: resnet50` is short for `model: {name: resnet50}`
                inner = {"name" if parent == "model" else "source": inner}
            section[parent] = inner = inner or {}
            section = inner
        section[last] = _value(option, value)


def _value(option: str, value: Any) -> Any:
    if option == "input_size" and value.isdecimal():
        return [3, int(value), int(value)]
    if option in ("mean", "std", "input_size"):
        try:
            return [float(part) if option != "input_size" else int(part) for part in value.split(",")]
        except ValueError as error:
            raise UsageError(f"--{option.replace('_', '-')} {value}: is not numbers with commas between") from error
    return value


def main(args: list[str] | None = None) -> None:
    """Run the command line; ends the process with an exit code of slim/errors.py."""
    # Waiting threads that spin slow torch down twentyfold on a machine that is also doing something else. OpenMP reads
    # this when torch is loaded, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = cli.main(args, prog_name="slim", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted; what was finished is whole. Go on with --resume.", err=True)
        code = EXIT_INTERRUPTED
    except SlimError as error:
        click.echo(f"Error: {error}", err=True)
        code = error.exit_code
    sys.exit(code if isinstance(code, int) else 0)
