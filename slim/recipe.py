"""Recipe: a whole run as one value; the command line, a YAML file and the Python call all become the same one.

`format: slim/1`, `model`, `data`, `target`, `seed`, `guard`, `passes`, `export`. Defaults live in the fields below and
in the passes, nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    SerializeAsAny,
    ValidationError,
)

from slim.contract import Pass
from slim.errors import RecipeError, did_you_mean
from slim.pipeline import Guard, Pipeline


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class InputSpec(_Section):
    """What overrides timm's data config; anything left out is timm's."""

    size: tuple[int, int, int] | None = None
    """Channels, height, width in pixels."""
    mean: tuple[float, ...] | None = None
    """Per channel, for values in [0, 1]."""
    std: tuple[float, ...] | None = None
    """Per channel, for values in [0, 1]."""
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = None
    """How images are resized."""
    crop: float | None = Field(default=None, gt=0, le=1)
    """Share of the resized image that the centre crop keeps, in (0, 1]."""


class ModelSpec(_Section):
    """The network that goes in."""

    name: str
    """timm model name, a run or artifact folder, or `package.module:factory` (needs --trust)."""
    args: dict[str, JsonValue] = {}
    """Arguments of the timm model."""
    weights: str = "pretrained"
    """`pretrained` (timm's own), `none` (fresh, from the seed), or the path of a .safetensors file."""
    input: InputSpec = InputSpec()
    """Overrides of timm's data config."""


class Limit(_Section):
    """Fewer images, chosen by the seed."""

    train: int | None = Field(default=None, ge=1)
    """Images of the training split."""
    val: int | None = Field(default=None, ge=1)
    """Images of the validation split."""


class DataSpec(_Section):
    """The images."""

    source: str
    """`digits`, `folder:/path`, `tar:/path` or `torchvision:NAME@/path`."""
    split: str | None = None
    """`train=0.8,val=0.2`: cuts a source that has no train and val folders."""
    unlabeled: str | None = None
    """Folder of plain images, or a list of `slim select-unlabeled`."""
    limit: Limit = Limit()
    """Fewer images than there are."""
    calib: int = Field(default=256, ge=1)
    """Training images set aside, by the seed, for passes that calibrate."""
    batch_size: int = Field(default=64, ge=1)
    """Images of one optimiser step, over all processes."""
    workers: int = Field(default=0, ge=0)
    """Reader processes of each training process."""


class ExportSpec(_Section):
    """What the chain ends in."""

    format: Literal["onnx"] = "onnx"
    """File format of the bundle."""


def _parse_pass(value: Any) -> Any:
    from slim.passes import PASSES, resolve

    if isinstance(value, Pass):
        return value
    if not isinstance(value, Mapping) or "name" not in value:
        raise ValueError(f"{_short(value)} is not a pass; write {{name: {next(iter(PASSES))}, ...}}")
    try:
        return build_pass(resolve(str(value["name"])), {key: item for key, item in value.items() if key != "name"})
    except RecipeError as error:
        raise ValueError(str(error)) from error  # pydantic adds which pass of the chain it is


def _dump_pass(value: Pass) -> dict[str, Any]:
    return {"name": value.name, **value.model_dump(mode="json")}


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _sourced(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


class Recipe(_Section):
    """A whole run."""

    format: Literal["slim/1"] = "slim/1"
    """Format of this file."""
    model: Annotated[ModelSpec, BeforeValidator(_named, json_schema_input_type=str | ModelSpec)]
    """The network that goes in."""
    data: Annotated[DataSpec | None, BeforeValidator(_sourced, json_schema_input_type=str | DataSpec | None)] = None
    """The images; without them accuracy is not measured and nothing can be trained."""
    target: str | None = None
    """`runtime[:device][,threads=N,batch=N]`; without it latency is not measured."""
    seed: int = Field(default=0, ge=0)
    """Every random number comes from it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where training computes; `auto` is CUDA where there is a device."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch; none leaves torch's choice. The target has threads of its own."""
    guard: Guard = Guard()
    """What a stage must give and may cost."""
    passes: tuple[Annotated[SerializeAsAny[Pass], BeforeValidator(_parse_pass), PlainSerializer(_dump_pass)], ...] = ()
    """The chain, in order."""
    export: ExportSpec | None = None
    """What the chain ends in; none writes no bundle."""

    def pipeline(self) -> Pipeline:
        """The chain under its guard."""
        return Pipeline(self.passes, self.guard)

    def resolved(self) -> dict[str, Any]:
        """Every value, as plain JSON."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The resolved recipe as a file that `slim run -f` takes."""
        return yaml.dump(self.resolved(), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)


def parse(values: Mapping[str, Any], *, place: str) -> Recipe:
    """Recipe from plain values. `place` begins the error: a file name, or `command line`.

    Raises:
        RecipeError: one line naming the key, the value and the rule.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{place}: {explain(error, Recipe)}") from error


def read(path: Path) -> dict[str, Any]:
    """The values of a recipe file, unchecked. Raises RecipeError when it is missing or not YAML."""
    try:
        values = plain_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: is not plain YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: holds {type(values).__name__}, a recipe is a mapping with model and passes")
    for key, spelt_out in (("model", _named), ("data", _sourced)):
        if key in values:
            values[key] = spelt_out(values[key])
    return values


class _Loader(yaml.SafeLoader):
    """Plain values only, as JSON has them and YAML 1.2: to PyYAML `on` is true, `1e-3` a word and 2025-01-01 a date."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads."""


_NUMBER = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_WORDS = {
    "tag:yaml.org,2002:bool": (re.compile("(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    "tag:yaml.org,2002:float": (re.compile(f"(?:{_NUMBER})$"), "-+.0123456789"),
}
for _yaml in (_Loader, _Dumper):
    _yaml.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag not in (*_WORDS, "tag:yaml.org,2002:timestamp")]
        for first, rules in _yaml.yaml_implicit_resolvers.items()
    }
    for _tag, (_pattern, _firsts) in _WORDS.items():
        _yaml.add_implicit_resolver(_tag, _pattern, list(_firsts))


def plain_yaml(text: str) -> Any:
    """The plain values in `text`; no tag of it is followed. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except ValueError as error:  # `!!int five`
        raise yaml.YAMLError(str(error)) from error


def assign(values: dict[str, Any], assignment: str, *, option: str = "--set", under: str = "") -> None:
    """Carry out one `--set passes.1.energy=0.9`, below the place `under` if given; list places count from 0.

    Raises:
        RecipeError: not KEY=VALUE, or a place the recipe does not have.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise RecipeError(f"{option} {assignment}: is not KEY=VALUE")
    try:
        value = plain_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{option} {assignment}: {text!r} is not a plain YAML value; quote it") from error
    put(values, f"{under}.{path}" if under else path, value, said=f"{option} {assignment}")


def put(values: dict[str, Any], path: str, value: Any, *, said: str) -> None:
    """Put `value` at a dotted place; sections on the way that are not there, or empty, are begun.

    Raises:
        RecipeError: a place the recipe does not have; the error begins with `said`.
    """
    *parents, last = path.split(".")
    here: Any = values
    for number, part in enumerate(parents):
        key = _key(here, part, ".".join(parents[:number]), said)
        if isinstance(here, dict) and here.get(key) is None:
            here[key] = {}
        here = here[key]
    here[_key(here, last, ".".join(parents), said)] = value


def _key(here: Any, part: str, name: str, said: str) -> Any:
    """The key that `part` is in `here`, a mapping or list called `name`."""
    if isinstance(here, dict):
        return part
    if not isinstance(here, list):
        raise RecipeError(f"{said}: {name} is {_short(here)} and has no {part!r}")
    if not part.isdecimal() or int(part) >= len(here):
        places = f"places 0 to {len(here) - 1}" if here else "no entries"
        raise RecipeError(f"{said}: {name} has {places}, not {part!r}")
    return int(part)


def build_pass(pass_class: type[Pass], values: Mapping[str, Any]) -> Pass:
    """A pass from plain values. Raises RecipeError naming the option, the value and the rule."""
    try:
        return pass_class(**values)
    except ValidationError as error:
        raise RecipeError(f"{pass_class.name}: {explain(error, pass_class)}") from error


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One of pydantic's errors in one line: key, value, rule, and the nearest known key for an unknown one."""
    # A misspelt key is often a missing one as well; its own name helps more.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    *parents, last = [str(part) for part in first["loc"]] or [""]
    where = ".".join((*parents, last))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key{did_you_mean(last, _fields(model, parents))}{more}"
    if first["type"] == "missing":
        return f"{where}: is missing{more}"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if first["type"] == "value_error":  # worded by ours, who name the value themselves
        return f"{where}: {message}{more}" if where else f"{message}{more}"
    return f"{where}: {_short(first['input'])} {message}{more}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _fields(model: type[BaseModel], parents: Sequence[str]) -> list[str]:
    """Field names of the section that `parents` leads to."""
    for part in parents:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        for candidate in (annotation, *getattr(annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
    return list(model.model_fields)


def schema() -> dict[str, Any]:
    """JSON schema of a recipe, with the fields of every pass."""
    from slim.passes import PASSES, resolve

    whole = Recipe.model_json_schema()
    choices = []
    for name in PASSES:
        fields = resolve(name).model_json_schema()
        fields["properties"] = {"name": {"const": name}, **fields["properties"]}
        fields["required"] = ["name", *fields.get("required", [])]
        whole["$defs"] |= fields.pop("$defs", {})
        choices.append(fields)
    whole["properties"]["passes"]["items"] = {"oneOf": choices}
    return whole
