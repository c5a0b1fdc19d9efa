"""What the options and the chain of `slim run` say, as a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slim import recipe
from slim.contract import Pass
from slim.errors import OrderError, RecipeError, UsageError
from slim.recipe import Recipe

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


def recipe_of(chain: Sequence[Pass | dict[str, str]], options: Mapping[str, Any]) -> Recipe:
    """The recipe that the options and the chain of `slim run` say together; `--set` has the last word.

    Raises:
        RecipeError: a value that cannot be, or a chain both in the file and on the command line.
        OrderError: `export` that is not last.
    """
    file: Path | None = options["recipe_file"]
    values = recipe.read(file) if file else {}
    for option, place in PLACES.items():
        if options[option] is not None:
            recipe.put(values, place, value_of(option, options[option]), said=f"--{option.replace('_', '-')}")
    for assignment in options["model_args"]:
        recipe.assign(values, assignment, option="--model-arg", under="model.args")
    if options["no_guard"]:
        recipe.put(values, "guard.on", False, said="--no-guard")
    _place_chain(values, chain, file)
    for assignment in options["assignments"]:
        recipe.assign(values, assignment)
    if "model" not in values and file is None:
        raise UsageError("--model is missing: the network to compress, by its timm name; see `slim run --help`")
    return recipe.parse(values, place=str(file) if file else "command line")


def input_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """What `--mean --std --crop --interpolation --input-size` say, under the names of `Preprocessing`."""
    names = {option: place.rpartition(".")[2] for option, place in PLACES.items() if place.startswith("model.input.")}
    given = {option: value for option, value in options.items() if option in names and value is not None}
    return {names[option]: value_of(option, value) for option, value in given.items()}


def value_of(option: str, value: Any) -> Any:
    """The value a recipe has for what click read. Raises UsageError."""
    if option == "input_size" and value.isdecimal():
        return [3, int(value), int(value)]
    if option in ("mean", "std", "input_size"):
        try:
            return [float(part) if option != "input_size" else int(part) for part in value.split(",")]
        except ValueError as error:
            raise UsageError(f"--{option.replace('_', '-')} {value}: is not numbers with commas between") from error
    return value


def _place_chain(values: dict[str, Any], chain: Sequence[Pass | dict[str, str]], file: Path | None) -> None:
    ends = [number for number, step in enumerate(chain) if isinstance(step, dict)]
    if ends and ends != [len(chain) - 1]:
        raise OrderError("'export' ends the chain, and something follows it; put one export, last")
    if ends:
        values["export"] = chain[-1]
    steps = [step for step in chain if not isinstance(step, dict)]
    if steps and values.get("passes"):
        raise RecipeError(f"{file}: has passes, and so has the command line; give the chain in one place")
    if steps:  # as a file has them, so that --set finds its way
        values["passes"] = [{"name": step.name, **step.model_dump(mode="json", exclude_unset=True)} for step in steps]
