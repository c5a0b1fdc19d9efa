"""One recipe, however it is written: on the command line, in YAML, in Python."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml

from slim import cli, recipe
from slim.contract import Pass, Role
from slim.errors import RecipeError
from slim.options import PLACES
from slim.passes import PASSES, resolve
from slim.pipeline import Guard
from slim.recipe import DataSpec, ExportSpec, InputSpec, Limit, ModelSpec, Recipe
from tests.option_values import ALONG, ONE_VALUE, VALUES

FIELDS = [(name, field) for name in PASSES for field in resolve(name).model_fields]
ACTS = {"recipe_file", "assignments", "model_args", "no_guard", "require_gain", "out", "resume", "trust"}
ACTS |= {"dry_run", "emit_yaml", "as_json", "quiet"}
"""Options of `slim run` that have no place of their own in a recipe."""


def words(field: str, value: Any) -> list[str]:
    option = f"--{field.replace('_', '-')}"
    if isinstance(value, bool):
        return [option if value else f"--no-{option[2:]}"]
    return [word for one in (value if isinstance(value, tuple) else [value]) for word in (option, str(one))]


@pytest.fixture
def emitted(capsys: pytest.CaptureFixture[str]) -> Any:
    """What `slim run ... --emit-yaml` prints."""

    def emit(*args: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(["run", "--emit-yaml", *args])
        out, err = capsys.readouterr()
        assert (ended.value.code, err) == (0, "")
        return out

    return emit


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    """The error of a recipe that cannot be, on one line; exit 2."""

    def refuse(*args: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(["run", "--emit-yaml", *args])
        out, err = capsys.readouterr()
        assert (ended.value.code, out) == (2, "")
        assert err.startswith("Error: ")
        assert err.count("\n") == 1
        return err

    return refuse


def parsed(text: str) -> Recipe:
    return recipe.parse(recipe.plain_yaml(text), place="test")


def written(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


# Three roads


def test_the_table_of_values_has_every_option_of_every_pass() -> None:
    assert {(name, field) for name, values in VALUES.items() for field in values} == set(FIELDS)
    for name, field in FIELDS:
        same = VALUES[name][field] == resolve(name).model_fields[field].default
        assert same == ((name, field) in ONE_VALUE)


@pytest.mark.parametrize(("name", "field"), FIELDS, ids=[".".join(pair) for pair in FIELDS])
def test_an_option_is_the_same_on_all_three_roads(emitted: Any, name: str, field: str) -> None:
    value = VALUES[name][field]
    along = ALONG.get((name, field), {})
    python = Recipe(model=ModelSpec(name="resnet18"), passes=(resolve(name)(**{field: value}, **along),))
    plain = {key: list(one) if isinstance(one, tuple) else one for key, one in {field: value, **along}.items()}
    assert parsed(yaml.safe_dump({"model": "resnet18", "passes": [{"name": name, **plain}]})) == python
    beside = [word for key, one in along.items() for word in words(key, one)]
    assert parsed(emitted("--model", "resnet18", name, *words(field, value), *beside)) == python
    assert getattr(python.passes[0], field) == value


def test_a_whole_recipe_is_the_same_on_all_three_roads(emitted: Any) -> None:
    # fmt: off
    line = [
        "--model", "convnext_atto", "--model-arg", "patch_size=2", "--model-arg", "depths=[1, 1]",
        "--model-arg", "conv_mlp=False", "--model-arg", "drop_path_rate=1e-1", "--weights", "w.safetensors",
        "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25", "--crop", "0.9", "--interpolation", "bilinear",
        "--input-size", "32", "--data", "folder:/d", "--split", "train=0.8,val=0.2", "--unlabeled", "/u",
        "--calib", "7", "--batch-size", "8", "--workers", "2", "--limit-train", "20", "--limit-val", "10",
        "--target", "ort:cpu,threads=2", "--device", "cpu", "--threads", "1", "--seed", "3",
        "--max-drop", "0.5", "--min-gain", "5", "--no-guard",
        "finetune", "--epochs", "2", "low-rank", "--skip", "a.*", "--skip", "b", "finetune", "export",
    ]
    # fmt: on
    assert {f"--{option.replace('_', '-')}" for option in PLACES} <= set(line)
    text = """
model:
  name: convnext_atto
  args: {patch_size: 2, depths: [1, 1], conv_mlp: false, drop_path_rate: 0.1}
  weights: w.safetensors
  input:
    {size: [3, 32, 32], mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25], crop: 0.9, interpolation: bilinear}
data:
  source: folder:/d
  split: train=0.8,val=0.2
  unlabeled: /u
  calib: 7
  batch_size: 8
  workers: 2
  limit: {train: 20, val: 10}
target: ort:cpu,threads=2
device: cpu
threads: 1
seed: 3
guard: {max_drop: 0.5, min_gain: 5, on: false}
passes:
  - {name: finetune, epochs: 2}
  - {name: low-rank, skip: ["a.*", b]}
  - {name: finetune}
export: {format: onnx}
"""
    finetune, low_rank = resolve("finetune"), resolve("low-rank")
    args: dict[str, Any] = {"patch_size": 2, "depths": [1, 1], "conv_mlp": False, "drop_path_rate": 0.1}
    third = (0.5, 0.5, 0.5)
    fed = InputSpec(size=(3, 32, 32), mean=third, std=(0.25, 0.25, 0.25), crop=0.9, interpolation="bilinear")
    python = Recipe(
        model=ModelSpec(name="convnext_atto", args=args, weights="w.safetensors", input=fed),
        data=DataSpec(
            source="folder:/d",
            split="train=0.8,val=0.2",
            unlabeled="/u",
            calib=7,
            batch_size=8,
            workers=2,
            limit=Limit(train=20, val=10),
        ),
        target="ort:cpu,threads=2",
        device="cpu",
        threads=1,
        seed=3,
        guard=Guard(max_drop=0.5, min_gain=5, on=False),
        passes=(finetune(epochs=2), low_rank(skip=("a.*", "b")), finetune()),
        export=ExportSpec(),
    )
    assert parsed(text) == python
    assert parsed(emitted(*line)) == python


def test_every_option_of_run_has_a_place_in_the_recipe_or_is_an_act() -> None:
    assert {option.name for option in cli.run.params} == set(PLACES) | ACTS
    whole = recipe.parse({"model": "m", "data": "digits"}, place="test").resolved()
    for place in PLACES.values():
        section: Any = whole
        for part in place.split("."):
            assert part in section
            section = section[part]


def test_emitted_yaml_gives_the_same_recipe_again(emitted: Any, tmp_path: Path) -> None:
    once = emitted("--model", "resnet18", "--model-arg", "x='no'", "--model-arg", "y='1e-3'", "finetune", "export")
    assert emitted("-f", written(tmp_path, once)) == once
    assert parsed(once).model.args == {"x": "no", "y": "1e-3"}


def test_emitted_json_is_the_same_recipe(emitted: Any) -> None:
    given = ("--model", "resnet18", "low-rank", "--energy", "0.8")
    assert recipe.parse(json.loads(emitted("--json", *given)), place="test") == parsed(emitted(*given))


class Odd(Pass):
    """Fields of every kind that an option can have."""

    name: ClassVar[str] = "odd"
    role: ClassVar[Role] = "repair"

    fast: bool = True
    """Whether it is fast."""
    kind: Literal["a", "b"] = "a"
    """Which."""
    top: int | None = None
    """How many."""
    names: tuple[str, ...] = ()
    """Which ones."""


@pytest.mark.parametrize(
    ("line", "built"),
    [
        ([], Odd()),
        (["--fast"], Odd()),
        (["--no-fast"], Odd(fast=False)),
        (["--kind", "b"], Odd(kind="b")),
        (["--top", "0"], Odd(top=0)),
        (["--names", "x", "--names", "y"], Odd(names=("x", "y"))),
    ],
    ids=str,
)
def test_flags_choices_and_lists_become_options(line: list[str], built: Odd) -> None:
    assert cli.pass_command(Odd).main(line, standalone_mode=False) == built


def test_help_gives_each_field_with_its_line_and_default() -> None:
    text = cli.pass_command(Odd).get_help(cli.click.Context(cli.pass_command(Odd)))
    for expected in ("--fast / --no-fast", "Whether it is fast. [default: True]", "--kind [a|b]", "[default: none]"):
        assert expected in text


# Overriding

BASE = "model: resnet18\ndata: digits\npasses:\n  - {name: finetune}\n  - {name: low-rank, skip: [a, b]}\n"


def test_an_option_overrides_the_file_and_set_overrides_both(emitted: Any, tmp_path: Path) -> None:
    path = written(tmp_path, BASE + "seed: 1\ntarget: ort:cpu\n")
    found = parsed(
        emitted("-f", path, "--seed", "2", "--limit-val", "9", "--model-arg", "in_chans=1", "--set", "seed=3")
    )
    assert (found.seed, found.target) == (3, "ort:cpu")
    assert found.model == ModelSpec(name="resnet18", args={"in_chans": 1})
    assert found.data == DataSpec(source="digits", limit=Limit(val=9))
    assert len(found.passes) == 2


@pytest.mark.parametrize(
    ("assignment", "place", "value"),
    [
        ("passes.1.energy=0.8", "passes.1.energy", 0.8),
        ("passes.1.energy=8e-1", "passes.1.energy", 0.8),
        ("passes.1.skip=[x]", "passes.1.skip", ["x"]),
        ("passes.1.skip.0=x", "passes.1.skip", ["x", "b"]),
        ("passes.0={name: low-rank, energy: 1}", "passes.0.energy", 1.0),
        ("data.limit.train=5", "data.limit.train", 5),
        ("model.args.act_layer=no", "model.args.act_layer", "no"),
        ("export.format=onnx", "export.format", "onnx"),
        ("guard.on=false", "guard.on", False),
        ("target=", "target", None),
    ],
)
def test_set_reaches_every_place(emitted: Any, tmp_path: Path, assignment: str, place: str, value: Any) -> None:
    found: Any = parsed(emitted("-f", written(tmp_path, BASE), "--set", assignment)).resolved()
    for part in place.split("."):
        found = found[int(part)] if part.isdecimal() else found[part]
    assert found == value


def test_set_reaches_a_chain_of_the_command_line(emitted: Any) -> None:
    found = parsed(emitted("--model", "m", "--set", "passes.1.align=4", "finetune", "low-rank", "--energy", "0.7"))
    assert found.passes[1] == resolve("low-rank")(energy=0.7, align=4)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("passes.1.energy", "--set passes.1.energy: is not KEY=VALUE"),
        ("=3", "--set =3: is not KEY=VALUE"),
        ("passes.2.energy=1", "--set passes.2.energy=1: passes has places 0 to 1, not '2'"),
        ("passes.-1.energy=1", "passes has places 0 to 1, not '-1'"),
        ("passes.first=1", "passes has places 0 to 1, not 'first'"),
        ("passes.1.skip.9=x", "passes.1.skip has places 0 to 1, not '9'"),
        ("model.name.x=1", "--set model.name.x=1: model.name is 'resnet18' and has no 'x'"),
        ("seed=[", "--set seed=[: '[' is not a plain YAML value"),
        ("seed=!!python/object/apply:os.getcwd []", "is not a plain YAML value"),
        ("seed=!!int five", "is not a plain YAML value"),
        ("passes.1.enrgy=1", "passes.1: low-rank: enrgy: unknown key; did you mean 'energy'?"),
        ("passes.1.energy=1.5", "passes.1: low-rank: energy: 1.5 should be less than or equal to 1"),
    ],
)
def test_a_set_that_cannot_be_says_why(refused: Any, tmp_path: Path, assignment: str, message: str) -> None:
    assert message in refused("-f", written(tmp_path, BASE), "--set", assignment)


def test_a_model_argument_that_is_no_pair_is_named(refused: Any) -> None:
    assert "Error: --model-arg x: is not KEY=VALUE" in refused("--model", "m", "--model-arg", "x")


def test_a_chain_in_both_places_is_refused(refused: Any, tmp_path: Path) -> None:
    path = written(tmp_path, BASE)
    assert f"{path}: has passes, and so has the command line; give the chain in one place" in refused(
        "-f", path, "finetune"
    )


def test_a_chain_on_the_command_line_may_end_a_file_without_one(emitted: Any, tmp_path: Path) -> None:
    found = parsed(emitted("-f", written(tmp_path, "model: resnet18\npasses: []\n"), "finetune", "export"))
    assert [step.name for step in found.passes] == ["finetune"]
    assert found.export == ExportSpec()


# Recipes that cannot be


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: m", "modle: unknown key; did you mean 'model'? (and 1 more)"),
        ("model: {name: m, weigths: none}", "model.weigths: unknown key; did you mean 'weights'?"),
        ("model: {name: m, input: {sizes: 3}}", "model.input.sizes: unknown key; did you mean 'size'?"),
        ("model: m\ndata: {source: digits, limits: {}}", "data.limits: unknown key; did you mean 'limit'?"),
        ("model: m\ndata: {source: d, limit: {trian: 1}}", "data.limit.trian: unknown key; did you mean 'train'?"),
        ("model: m\nguard: {max_dorp: 1}", "guard.max_dorp: unknown key; did you mean 'max_drop'?"),
        ("model: m\nexport: {fromat: onnx}", "export.fromat: unknown key; did you mean 'format'?"),
        ("model: m\npasses: [{name: low-rank, enrgy: 1}]", "passes.0: low-rank: enrgy: unknown key; did you mean 'en"),
        ("model: m\npasses: [{name: lowrank}]", "passes.0: pass 'lowrank' is unknown; did you mean 'low-rank'?"),
        ("model: m\npasses: [{name: finetune}, {lr: 1}]", "passes.1: {'lr': 1} is not a pass; write {name: distill,"),
        ("model: m\npasses: [low-rank]", "passes.0: 'low-rank' is not a pass; write {name: distill, ...}"),
        ("model: m\npasses: low-rank", "passes: 'low-rank' should be a valid tuple"),
        ("model: {args: {}}", "model.name: is missing"),
        ("model: [m]", "model: ['m'] should be a valid dictionary"),
        ("model: m\nseed: one", "seed: 'one' should be a valid integer"),
        ("model: m\nseed: -1", "seed: -1 should be greater than or equal to 0"),
        ("model: m\ndevice: gpu", "device: 'gpu' should be 'auto', 'cpu' or 'cuda'"),
        ("model: m\nexport: {format: onxx}", "export.format: 'onxx' should be 'onnx'"),
        ("model: {name: m, input: {crop: 2}}", "model.input.crop: 2 should be less than or equal to 1"),
        ("model: m\ndata: {source: d, batch_size: 0}", "data.batch_size: 0 should be greater than or equal to 1"),
        ("model: m\nformat: slim/2", "format: 'slim/2' should be 'slim/1'"),
        ("model: m\npasses: [{name: low-rank, energy: 0.5, ratio: 0.5}]", "passes.0: low-rank: energy=0.5 and ratio=0"),
        ("model: m\npasses: [{name: finetune, epochs: 1.5}]", "passes.0: finetune: epochs: 1.5 should be a valid int"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(refused: Any, tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    assert f"Error: {path}: {message}" in refused("-f", path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "is not plain YAML: while parsing"),
        ("model: !!python/object/apply:os.mkdir [DIR]", "is not plain YAML: could not determine a constructor"),
        ("model: !!python/name:os.getcwd", "is not plain YAML: could not determine a constructor"),
        ("- model", "holds list, a recipe is a mapping"),
        ("", "holds NoneType, a recipe is a mapping"),
        ("\x00", "is not plain YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_and_executes_nothing(
    refused: Any, tmp_path: Path, text: str, message: str
) -> None:
    path = written(tmp_path, text.replace("DIR", str(tmp_path / "made")))
    assert f"{path}: {message}" in refused("-f", path)
    assert not (tmp_path / "made").exists()


def test_a_missing_file_is_named(refused: Any, tmp_path: Path) -> None:
    assert f"{tmp_path}/none.yaml: cannot be read: No such file" in refused("-f", f"{tmp_path}/none.yaml")


def test_a_wrong_option_is_named_without_a_file(refused: Any) -> None:
    assert "--mean 0.5,x: is not numbers with commas between" in refused("--model", "m", "--mean", "0.5,x")
    assert "command line: data.source: is missing" in refused("--model", "m", "--limit-val", "3")
    assert "low-rank: energy: 1.5 should be less than or equal to 1" in refused(
        "--model", "m", "low-rank", "--energy", "1.5"
    )


def test_words_and_numbers_are_read_by_yaml_1_2() -> None:
    found = recipe.plain_yaml("[on, no, yes, 1e-3, 2025-01-01, true, 1, .5, 1., -.inf, 1.5e+3]")
    assert found == ["on", "no", "yes", 0.001, "2025-01-01", True, 1, 0.5, 1.0, float("-inf"), 1500.0]
    assert [type(value) for value in found[5:7]] == [bool, int]


# The schema


JSON_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "null": (type(None),),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
}
LIMITS: dict[str, Callable[[Any, Any], bool]] = {
    "const": operator.eq,
    "enum": lambda value, rule: value in rule,
    "minimum": operator.ge,
    "maximum": operator.le,
    "exclusiveMinimum": operator.gt,
    "exclusiveMaximum": operator.lt,
    "minItems": lambda value, rule: len(value) >= rule,
    "maxItems": lambda value, rule: len(value) <= rule,
}
SAID_ONLY = {"title", "description", "default", "$defs", "required", "additionalProperties", "prefixItems"}


def fits(value: Any, schema: Any, whole: Any) -> bool:
    """As much of JSON Schema as a recipe's needs; a keyword that is not among it fails the test."""
    if "type" in schema:
        is_bool = isinstance(value, bool) and schema["type"] != "boolean"
        if is_bool or not isinstance(value, JSON_TYPES[schema["type"]]):
            return False
    return all(_keeps(keyword, rule, value, schema, whole) for keyword, rule in schema.items())


def _keeps(keyword: str, rule: Any, value: Any, schema: Any, whole: Any) -> bool:
    if keyword in LIMITS:
        return LIMITS[keyword](value, rule)
    match keyword:
        case "$ref":
            return fits(value, whole["$defs"][rule.removeprefix("#/$defs/")], whole)
        case "anyOf":
            return any(fits(value, choice, whole) for choice in rule)
        case "oneOf":
            return [fits(value, choice, whole) for choice in rule].count(True) == 1
        case "items":
            return all(fits(item, rule, whole) for item in value)
        case "properties":
            known = all(name in rule for name in value) or schema.get("additionalProperties", True) is not False
            there = all(name in value for name in schema.get("required", ()))
            return known and there and all(fits(value[name], rule[name], whole) for name in rule if name in value)
    assert keyword in SAID_ONLY | {"type"}, keyword
    return True


def test_the_schema_accepts_what_is_emitted_and_what_is_short(emitted: Any) -> None:
    whole = recipe.schema()
    line = ["--model", "m", "--data", "digits", "--input-size", "32", "--no-guard"]
    for name, field in FIELDS:
        line += [name, *words(field, VALUES[name][field])]
        line += [word for key, one in ALONG.get((name, field), {}).items() for word in words(key, one)]
    assert fits(recipe.plain_yaml(emitted(*line, "export")), whole, whole)
    assert fits({"model": "m", "data": "digits", "passes": [{"name": "low-rank"}]}, whole, whole)


@pytest.mark.parametrize(
    "wrong",
    [
        {"modle": "m"},
        {"model": 3},
        {"model": "m", "passes": [{"name": "lowrank"}]},
        {"model": "m", "passes": [{"energy": 0.5}]},
        {"model": "m", "passes": [{"name": "low-rank", "energy": 1.5}]},
        {"model": "m", "passes": [{"name": "low-rank", "epochs": 1}]},
        {"model": "m", "guard": {"max_drop": -1}},
    ],
    ids=str,
)
def test_the_schema_refuses_what_a_recipe_refuses(wrong: dict[str, Any]) -> None:
    whole = recipe.schema()
    assert not fits(wrong, whole, whole)
    with pytest.raises(RecipeError):
        recipe.parse(wrong, place="test")


# Recipes in the tree

RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))


def test_the_tree_has_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_in_the_tree_can_work(path: Path) -> None:
    found = recipe.parse(recipe.read(path), place=str(path))
    assert found.passes
    assert found.pipeline().stages()
