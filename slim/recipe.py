"""Recipe: a whole run as one value; the command line, a YAML file and the Python call all become the same one.

`format: slim/1`, `model`, `data`, `target`, `seed`, `guard`, `passes`, `export`. Defaults live in the fields below and
in the passes, nowhere else.
"""

from __future__ import annotations

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
    """timm model name, or `package.module:factory` (needs --trust)."""
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
    """Folder of plain images."""
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
    if not isinstance(value, Mapping):
        return value
    if "name" not in value:
        raise RecipeError(f"a pass needs a name, {dict(value)} has none")
    from slim.passes import resolve

    return build_pass(resolve(str(value["name"])), {key: item for key, item in value.items() if key != "name"})


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
    model: Annotated[ModelSpec, BeforeValidator(_named)]
    """The network that goes in."""
    data: Annotated[DataSpec | None, BeforeValidator(_sourced)] = None
    """The images; without them accuracy is not measured and nothing can be trained."""
    target: str | None = None
    """`runtime[:device][,threads=N,batch=N]`; without it latency is not measured."""
    seed: int = Field(default=0, ge=0)
    """Every random number comes from it."""
    device: str = "auto"
    """Where training computes: `auto`, `cpu`, `cuda`."""
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
        return yaml.safe_dump(self.resolved(), sort_keys=False, default_flow_style=None, width=120)


def parse(values: Mapping[str, Any], *, place: str) -> Recipe:
    """Recipe from plain values. `place` begins the error: a file name, or `command line`.

    Raises:
        RecipeError: one line naming the key, the value and the rule.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{place}: {explain(error, Recipe)}") from error
    except RecipeError as error:
        raise RecipeError(f"{place}: {error}") from error


def read(path: Path) -> dict[str, Any]:
    """The values of a recipe file, unchecked. Raises RecipeError when it is missing or not YAML."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())
        raise RecipeError(f"{path}: is not YAML: {detail}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: holds {type(values).__name__}, a recipe is a mapping with model and passes")
    return values


def assign(values: dict[str, Any], assignment: str) -> None:
    """Carry out one `--set passes.1.energy=0.9`; list places count from 0.

    Raises:
        RecipeError: not KEY=VALUE, or a place the recipe does not have.
    """
    path, equals, text = assignment.partition("=")
    if not equals:
        raise RecipeError(f"--set {assignment}: is not KEY=VALUE")
    *parents, last = path.split(".")
    place: Any = values
    for number, part in enumerate(parents):
        before = ".".join(parents[:number])
        if isinstance(place, list):
            place = place[_place(part, place, assignment, before)]
        elif isinstance(place, dict):
            place = place.setdefault(part, {})
            if place is None:
                raise RecipeError(f"--set {assignment}: {before}.{part} is empty in the recipe; set it as a whole")
        else:
            raise RecipeError(f"--set {assignment}: {before!r} is {place!r} and has no {part!r}")
    value = yaml.safe_load(text)
    if isinstance(place, list):
        place[_place(last, place, assignment, ".".join(parents))] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise RecipeError(f"--set {assignment}: {'.'.join(parents)!r} is {place!r} and has no {last!r}")


def _place(part: str, place: Sequence[Any], assignment: str, name: str) -> int:
    if not part.isdecimal() or int(part) >= len(place):
        raise RecipeError(f"--set {assignment}: {name} has places 0 to {len(place) - 1}, not {part!r}")
    return int(part)


def build_pass(pass_class: type[Pass], values: Mapping[str, Any]) -> Pass:
    """A pass from plain values. Raises RecipeError naming the option, the value and the rule."""
    try:
        return pass_class(**values)
    except ValidationError as error:
        raise RecipeError(f"{pass_class.name}: {explain(error, pass_class)}") from error


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first of pydantic's errors in one line: key, value, rule, and the nearest known key for an unknown one."""
    first = error.errors()[0]
    *parents, last = [str(part) for part in first["loc"]] or ["values"]
    where = ".".join((*parents, last))
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key{did_you_mean(last, _fields(model, parents))}"
    if first["type"] == "missing":
        return f"{where}: is missing"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if not first["loc"]:
        return f"{message}{more}"
    return f"{where}: {first['input']!r} {message}{more}"


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
        choices.append(fields)
    whole["properties"]["passes"]["items"] = {"oneOf": choices}
    return whole
