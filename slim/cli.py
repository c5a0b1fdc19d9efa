"""The command line. Importing it loads click alone: `slim --help` needs neither torch nor timm.

The options of a pass are read off its fields, and the chain is a click group of such commands: each returns its pass
and does nothing; the end of the chain acts.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slim import __version__
from slim.errors import EXIT_INTERRUPTED, SlimError, did_you_mean
from slim.fields import option_of

if TYPE_CHECKING:
    from slim.contract import Pass

EXIT_CODES = """\b
Exit codes:
  0    done, every budget kept          4    a budget could not be decided
  1    failure                          5    target missing, or not the budget's device
  2    option, recipe, data or order    6    exported file differs from the network
  3    budget missed                    130  interrupted"""


EXAMPLE = """\b
Example:
  slim run --model resnet50 --data folder:/data --target ort:cpu --out runs/r50 \\
      low-rank --energy 0.9  finetune --epochs 10  export"""


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


class PassCommand(click.Command):
    """A link of the chain; an option of `slim run` found behind it is sent back to its place."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Click's, with a better word for an option that stands too late."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if any(error.option_name in option.opts for option in run.params):
                ctx.fail(f"{error.option_name} belongs to the run, not to {self.name!r}; put it before the first pass")
            raise


SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(cls=Suggesting, epilog=EXIT_CODES, context_settings=SETTINGS)
@click.version_option(__version__, prog_name="slim")
def cli() -> None:
    """Compress vision backbones, judged in milliseconds on the runtime they are served on."""


def shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--json` and `--quiet`, which every command has."""
    command = click.option("--quiet", is_flag=True, help="Say nothing but the result, warnings and errors.")(command)
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def together(*options: Callable[..., Any]) -> Callable[..., Any]:
    """Options that several commands have, in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


fed = together(
    click.option("--input-size", metavar="PIXELS|C,H,W", help="Size of the network's input."),
    click.option("--mean", metavar="R,G,B", help="What is subtracted from values in [0, 1]."),
    click.option("--std", metavar="R,G,B", help="What values in [0, 1] are divided by, after --mean."),
    click.option("--crop", type=float, metavar="SHARE", help="What the centre crop keeps of the resized image."),
    click.option("--interpolation", metavar="NAME", help="nearest, bilinear or bicubic: how images are resized."),
)
"""How images become the network's input; each overrides what is known of the network."""

loaded = together(
    click.option("--data", metavar="SOURCE", help="digits, folder:/path, tar:/path or torchvision:NAME@/path."),
    click.option("--split", metavar="train=0.8,val=0.2", help="Cuts class folders that have no train and val."),
    click.option("--unlabeled", metavar="FOLDER|LIST", help="Plain images, or what select-unlabeled chose of them."),
    click.option("--calib", type=int, metavar="N", help="Training images set aside for calibration."),
    click.option("--batch-size", type=int, metavar="N", help="Images of one optimiser step, over all processes."),
    click.option("--workers", type=int, metavar="N", help="Reader processes."),
    click.option("--limit-train", type=int, metavar="N", help="Use only so many training images."),
    click.option("--limit-val", type=int, metavar="N", help="Use only so many validation images."),
)
"""Which images, and how they are read."""

measured = together(
    click.option("--target", metavar="RUNTIME[:DEVICE][,threads=N,batch=N]", help="Where it will be served: ort:cpu."),
    click.option("--device", metavar="DEVICE", help="Where training computes: auto, cpu or cuda."),
    click.option("--threads", type=int, metavar="N", help="CPU threads of torch; the target has threads of its own."),
    click.option("--seed", type=int, metavar="N", help="Every random number comes from it."),
)
"""Where things are measured and computed."""

guarded = together(
    click.option("--max-drop", type=float, metavar="POINTS", help="Largest loss of top-1 in one stage."),
    click.option("--min-gain", type=float, metavar="PERCENT", help="Least latency a structural pass must save."),
    click.option("--no-guard", is_flag=True, help="Keep every stage whatever it costs."),
)
"""What a stage must give and may cost."""

TRUST = click.option("--trust", is_flag=True, help="Import a package.module:factory model: runs that code.")


@cli.group(
    cls=Chain,
    chain=True,
    invoke_without_command=True,
    short_help="Send a network through passes; measure what comes out.",
    epilog=f"{EXAMPLE}\n\n{EXIT_CODES}",
)
@click.option("-f", "recipe_file", metavar="RECIPE", type=click.Path(path_type=Path), help="YAML; options override it.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="passes.1.energy=0.9; counts from 0.")
@click.option("--model", metavar="NAME", help="timm's name, a run, an artifact, or package.module:factory.")
@click.option(
    "--model-arg",
    "model_args",
    multiple=True,
    metavar="KEY=VALUE",
    help="Of the model; YAML: 2, false, null.",
)
@click.option("--weights", metavar="WHICH", help="pretrained (the default), none, or a .safetensors file.")
@fed
@loaded
@measured
@guarded
@click.option("--require-gain", is_flag=True, help="End with 1 when every structural stage was rolled back.")
@click.option("--out", metavar="FOLDER", type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@TRUST
@click.option("--dry-run", is_flag=True, help="Check order and inputs, print the plan, do nothing.")
@click.option("--emit-yaml", is_flag=True, help="Print the recipe, do nothing.")
@shared
def run(**options: Any) -> None:
    """Send a network through a chain of passes; measure what comes out.

    Options come before the first pass; those of a pass (slim run PASS --help) behind its name.
    """


@run.result_callback()
def act(chain: list[Any], **options: Any) -> None:
    """The end of the chain: builds the recipe, then does what was asked."""
    from slim import commands
    from slim.options import recipe_of

    recipe = recipe_of(chain, options)
    if options["emit_yaml"]:
        click.echo(json.dumps(recipe.resolved()) if options["as_json"] else recipe.to_yaml().rstrip())
    elif options["dry_run"]:
        commands.dry_run(recipe, trust=options["trust"], as_json=options["as_json"])
    else:
        commands.run(recipe, options)


@click.command("export", cls=PassCommand)
@click.option(
    "--format", "format_", metavar="FORMAT", default="onnx", show_default=True, help="onnx is the one so far."
)
def export_end(format_: str) -> dict[str, str]:
    """Write the bundle: the exported file and everything needed to serve it. Comes last."""
    return {"format": format_}


def pass_command(pass_class: type[Pass]) -> click.Command:
    """The command of a pass: one option for each field, none of them with a default of its own."""
    from slim.recipe import build_pass

    def build(**given: Any) -> Pass:
        return build_pass(pass_class, {name: value for name, value in given.items() if value not in (None, ())})

    # What is special about the pass comes before what all that train have.
    fields = sorted(pass_class.model_fields.items(), key=lambda field: field[0] not in pass_class.__annotations__)
    options: list[click.Parameter] = [option_of(name, info) for name, info in fields]
    text = (pass_class.__doc__ or "").strip()
    return PassCommand(pass_class.name, callback=build, params=options, help=text, short_help=text.split("\n")[0])


@cli.command()
@click.option(
    "--out",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Folder of the run.",
)
@shared
def demo(out: Path, as_json: bool, quiet: bool) -> None:
    """The whole road in a few minutes, on handwritten digits.

    A small network is trained, one compression stage is kept, one rolled back, the result is measured and judged.
    """
    from slim import commands

    commands.demo(out, as_json=as_json, quiet=quiet)


@cli.command()
@click.argument("folder", metavar="RUN|ARTIFACT", type=click.Path(path_type=Path))
@TRUST
@shared
def show(folder: Path, trust: bool, as_json: bool, quiet: bool) -> None:
    """Lineage and figures of a run or an artifact."""
    from slim import commands

    commands.show(folder, trust=trust, as_json=as_json)


@cli.command()
@click.argument("folder", metavar="RUN|ARTIFACT", type=click.Path(path_type=Path))
@click.option(
    "--out",
    metavar="FILE.svg",
    type=click.Path(path_type=Path),
    help="The picture. [default: layers.svg in the folder]",
)
@TRUST
@shared
def explain(folder: Path, out: Path | None, trust: bool, as_json: bool, quiet: bool) -> None:
    """What was decided for each layer, and why.

    A table and a picture. Beside it stands what the layer's kernels are like: the share that is nearly zero; H/T, their
    variety, above 1 as if they were never trained; and how orthogonal its filters are, from 0 to 1.
    """
    from slim import commands

    commands.explain(folder, out or folder / "layers.svg", trust=trust, as_json=as_json)


@cli.command("eval")
@click.argument("file", metavar="RUN|BUNDLE|FILE.onnx", type=click.Path(path_type=Path))
@click.option("--data", metavar="SOURCE", help="Images, for a plain .onnx file, or others than the run's.")
@click.option("--split", metavar="train=0.8,val=0.2", help="Cuts class folders that have no val.")
@click.option("--target", metavar="TARGET", help="Default: the run's, else ort:cpu.")
@fed
@TRUST
@shared
def evaluate(file: Path, **options: Any) -> None:
    """Accuracy of an exported file.

    The file of a run or bundle is fed as its network is, on the run's own validation images unless --data names others.
    """
    from slim import commands

    commands.evaluate(file, **options)


@cli.command("bench")
@click.argument("files", metavar="RUN|BUNDLE|FILE.onnx...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--target", "targets", metavar="TARGET", multiple=True, help="Default: the first run's, else ort:cpu.")
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Of the inputs and the order.")
@shared
def bench(files: tuple[Path, ...], targets: tuple[str, ...], seed: int, as_json: bool, quiet: bool) -> None:
    """Latency of exported files, each compared with the first.

    The two of a comparison are timed in turns, together with a control: the first file against itself. --target may be
    given more than once.
    """
    from slim import commands

    commands.bench(files, targets, seed=seed, as_json=as_json, quiet=quiet)


@cli.command("export")
@click.argument("folder", metavar="RUN|ARTIFACT", type=click.Path(path_type=Path))
@click.option("--format", "format_", metavar="FORMAT", default="onnx", show_default=True, help="onnx so far.")
@click.option("--out", metavar="FOLDER", required=True, type=click.Path(path_type=Path), help="Folder of the bundle.")
@click.option("--target", "targets", metavar="TARGET", multiple=True, help="Build its engine too, as tensorrt-rtx.")
@click.option("--uint8-input", is_flag=True, help="Add the file with mean and deviation in the graph: bytes in.")
@TRUST
@shared
def export(folder: Path, **options: Any) -> None:
    """Write the bundle of a run or an artifact."""
    from slim import bundles

    bundles.export(folder, **options)


@cli.group("bundle", cls=Suggesting)
def bundle() -> None:
    """What is shipped."""


@bundle.command("verify")
@click.argument("folder", metavar="BUNDLE", type=click.Path(path_type=Path))
@shared
def verify_bundle(folder: Path, as_json: bool, quiet: bool) -> None:
    """Whether a bundle is whole, and its files give here what they gave where it was written."""
    from slim import bundles

    sys.exit(bundles.verify_bundle(folder, as_json=as_json))


@cli.command(epilog=EXIT_CODES)
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--budgets", metavar="FILE", required=True, type=click.Path(path_type=Path), help="budgets.yaml.")
@click.option("--stored", is_flag=True, help="Judge the figures of report.json instead of measuring again.")
@click.option("--allow-inconclusive", is_flag=True, help="End with 0 when a budget could not be decided.")
@click.option("--junit", metavar="FILE", type=click.Path(path_type=Path), help="Write a JUnit file.")
@click.option("--markdown", metavar="FILE", type=click.Path(path_type=Path), help="Write a Markdown file.")
@TRUST
@shared
def gate(run_folder: Path, budgets: Path, **options: Any) -> None:
    """Judge a run by a file of budgets.

    What the run ships is measured again here, against its dense.onnx. A budget that was missed is named, and by how
    much.
    """
    from slim import commands

    sys.exit(commands.gate(run_folder, budgets, **options))


@cli.group("table", cls=Suggesting)
def table() -> None:
    """Latency of what a network can be cut to."""


@table.command("build")
@click.argument("folder", metavar="RUN|ARTIFACT", type=click.Path(path_type=Path))
@click.option("--target", metavar="TARGET", help="Default: the run's, else ort:cpu.")
@click.option("--out", metavar="FILE", type=click.Path(path_type=Path), help="Default: table.json in the folder.")
@click.option("--seed", type=int, metavar="N", help="Of the subnets that are measured. [default: the run's]")
@click.option("--again", is_flag=True, help="Measure again what the table holds.")
@TRUST
@shared
def build_table(folder: Path, out: Path | None, **options: Any) -> None:
    """Measure what a network can be cut to, on this machine.

    Some thirty whole subnets are exported and timed; for the others, latency is predicted from these. A table that was
    interrupted is gone on with. `slim family` and `subnet` take that of an elastic network as --table, `prune` and
    `low-rank` that of any other, whatever is trained in between. No images are needed.
    """
    from slim import commands

    commands.build_table(folder, out or folder / "table.json", **options)


@cli.command(short_help="Cut a network for each of several budgets out of an elastic one.", epilog=EXIT_CODES)
@click.argument("folder", metavar="RUN|ARTIFACT", type=click.Path(path_type=Path))
@click.option("--to", metavar="BUDGET,...", required=True, help="2ms,4ms,8ms or 0.5x-macs,0.25x-macs: of one kind.")
@loaded
@measured
@guarded
@click.option("--evaluations", type=int, metavar="N", help="Subnets evaluated, for all budgets. [default: 150]")
@click.option("--proposals", type=int, metavar="N", help="Proposed and ranked for each evaluation. [default: 2000]")
@click.option("--repair", metavar="HOW", help="norms, outputs, both or none; see `slim run subnet --help`.")
@click.option("--storage", metavar="URL", help="Where the search is kept. [default: search.db in --out]")
@click.option("--table", metavar="FILE", type=click.Path(path_type=Path), help="Latencies; measured where missing.")
@click.option("--polish", type=int, metavar="EPOCHS", default=0, help="Distill each from the elastic network.")
@click.option("--out", metavar="FOLDER", required=True, type=click.Path(path_type=Path), help="A run for each budget.")
@click.option("--resume", is_flag=True, help="Go on with the family in --out.")
@TRUST
@shared
def family(folder: Path, **options: Any) -> None:
    """Cut a network for each of several budgets out of an elastic one.

    One search serves all budgets; each network then goes through the guard, is exported and measured as in `slim run`,
    into a folder of its own. Images, target and seed are the run's unless others are given.
    """
    from slim import commands

    sys.exit(commands.family(folder, **options))


@cli.command("select-unlabeled", short_help="Choose plain images worth showing to a student.")
@click.option("--pool", metavar="FOLDER", required=True, type=click.Path(path_type=Path), help="Plain images.")
@click.option("--teacher", metavar="RUN|ARTIFACT|NAME", required=True, help="Judges the images; NAME is one of timm's.")
@click.option("--data", metavar="SOURCE", required=True, help="Its validation images are kept out.")
@click.option("--split", metavar="train=0.8,val=0.2", help="Cuts class folders that have no val; as in the run.")
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Of the cut; as in the run.")
@click.option("--per-class", type=int, metavar="K", required=True, help="Most images kept of one class.")
@click.option(
    "--max-hamming",
    type=int,
    metavar="N",
    help="Bits of 64 in which hashes of near-duplicates differ at most; half of them suffice alone. [default: 10]",
)
@click.option(
    "--min-cosine",
    type=float,
    metavar="C",
    help="Least cosine of their embeddings, where more than half of N bits differ. [default: 0.9]",
)
@click.option("--batch-size", type=int, metavar="N", default=64, show_default=True, help="Images of one forward pass.")
@click.option("--workers", type=int, metavar="N", default=0, show_default=True, help="Reader processes.")
@click.option("--out", metavar="LIST.jsonl", required=True, type=click.Path(path_type=Path), help="For --unlabeled.")
@TRUST
@shared
def select_unlabeled(out: Path, **options: Any) -> None:
    """Choose from a pool of plain images those worth showing to a student.

    Near-duplicates of validation images are left out; of the others, the K that the teacher is surest of in each class
    are listed in a file that --unlabeled of `slim run` takes.
    """
    from slim import commands

    commands.select_unlabeled(out, **options)


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
    """List the passes, or print the card of one.

    A card says what the pass does, its figures and its limits.
    """
    from slim import commands

    commands.passes(card, as_json=as_json)


@cli.command()
@shared
def schema(as_json: bool, quiet: bool) -> None:
    """JSON schema of a recipe."""
    from slim.recipe import schema as recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=1))


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
        click.echo("Error: interrupted; what was finished is whole, and --resume goes on with it", err=True)
        code = EXIT_INTERRUPTED
    except SlimError as error:
        # One line, also where a library's own words in it had several.
        click.echo(f"Error: {' '.join(str(error).splitlines())}", err=True)
        code = error.exit_code
    sys.exit(code if isinstance(code, int) else 0)
