"""An exported file, the run it lies in, and what the run says of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from slim import recipe, store
from slim.artifact import Artifact, Preprocessing
from slim.errors import StoreError, UsageError
from slim.recipe import Recipe
from slim.runs import Run, open_run


@dataclass(frozen=True)
class Served:
    """An exported file, and what it belongs to."""

    path: Path
    run: Run | None = None
    """The run it lies in; none for a file that stands alone."""

    @property
    def target(self) -> str:
        """The target of its run, or the default one."""
        return (recipe_of(self.run).target if self.run else None) or "ort:cpu"

    def preprocessing(self, given: Mapping[str, Any]) -> Preprocessing:
        """How it is fed: as its run or bundle says, overridden by what is `given`.

        Raises:
            UsageError: a file that stands alone, and `given` leaves something open.
        """
        from slim.export.onnx import read_ports

        known: dict[str, Any] = {}
        beside = self.path.parent / "preprocess.json"
        if self.run:
            is_dense = self.run.dense.exists() and self.path.samefile(self.run.dense)
            known = (self.run.dense_input if is_dense else self.run.artifact.backbone.input).model_dump()
        elif beside.is_file():
            known = _bundled_preprocessing(beside)
        else:
            known["size"] = read_ports(self.path)[0][0].shape[1:]
            if missing := [f"--{name}" for name in ("mean", "std", "crop", "interpolation") if name not in given]:
                raise UsageError(
                    f"{self.path}: nothing beside it says how images become its input; give {' '.join(missing)}"
                )
        try:
            return Preprocessing.model_validate({**known, **given})
        except ValidationError as error:
            raise UsageError(f"{self.path}: {recipe.explain(error, Preprocessing)}") from error


def served(path: Path, *, trust: bool = False) -> Served:
    """The file that a run or bundle serves, or the .onnx file itself.

    Raises:
        UsageError: neither a run, a bundle nor an .onnx file.
    """
    if path.suffix == ".onnx" and not path.is_dir():
        if not path.is_file():
            raise UsageError(f"{path}: no such file")
        return Served(path, run_around(path, trust=trust))
    if (path / "manifest.json").is_file():
        return served(path / "model.onnx", trust=trust)
    if (path / "bundle.json").is_file():
        raise StoreError(f"{path}: a bundle of format slim-bundle/1; write it again with `slim export`")
    found = open_run(path, trust=trust)
    file = found.bundle / "model.onnx"
    if not file.is_file():
        raise UsageError(f"{path}: has no bundle; `slim export {path} --out {found.bundle}` writes it")
    return Served(file, found)


def run_around(path: Path, *, trust: bool) -> Run | None:
    """The run that a file or an artifact lies in: a step, what it ships, or its dense.onnx."""
    roots = (parent for parent in path.absolute().parents[:2] if (parent / "recipe.yaml").is_file())
    return next((Run(root, trust=trust) for root in roots), None)


def recipe_of(found: Run) -> Recipe:
    """What a run was made by."""
    return recipe.parse(recipe.read(found.recipe_path), place=str(found.recipe_path))


def _bundled_preprocessing(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_bytes())
        return {name: known[name] for name in Preprocessing.model_fields}
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: is not a bundle's preprocessing ({error!r}); write the bundle again") from error


def artifact_in(folder: Path, *, trust: bool) -> tuple[Artifact, Run | None]:
    """The artifact in `folder`, or the final one of the run there."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give a run or an artifact")
    if not (folder / "recipe.yaml").is_file():
        return store.load(folder, trust=trust), None
    found = Run(folder, trust=trust)
    if not found.final.is_dir():
        raise UsageError(f"{folder}: the run is not finished; end it with --resume, or name one of its steps/")
    return found.artifact, found
