"""Artifacts on disk: `slim.json` + `weights.safetensors`, replayed, never unpickled.

Loading builds the backbone, applies every step's `rewrite` in order and loads the values strictly. A digest covers the
values, and another all of `slim.json`, so that a change of either is found. Everything is written beside its place and
renamed, so a full disk or a Ctrl-C leaves the last good file whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from slim.artifact import FRESH, Artifact, Backbone, Step
from slim.errors import RecipeError, StoreError

FORMAT = "slim/1"
MANIFEST = "slim.json"
WEIGHTS = "weights.safetensors"


class Manifest(BaseModel):
    """slim.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str
    backbone: Backbone
    labels: tuple[str, ...] | None
    weights: str
    """Digest of the values."""
    history: tuple[Step, ...]
    digest: str
    """sha256 over everything above."""


def save(artifact: Artifact, folder: str | Path) -> Path:
    """Write `artifact` as a folder. An older artifact there is replaced once the new one is whole, anything else never.

    Raises:
        StoreError: the disk is full, or the place is taken or not writable.
    """
    folder = Path(folder)
    if folder.exists() and not ((folder / MANIFEST).is_file() or (folder.is_dir() and not any(folder.iterdir()))):
        raise StoreError(f"{folder}: exists and is not an artifact (no {MANIFEST}); choose another place")
    content = {
        "format": FORMAT,
        "backbone": artifact.backbone.model_dump(mode="json"),
        "labels": artifact.labels,
        "weights": artifact.weights,
        "history": [step.model_dump(mode="json") for step in artifact.history],
    }
    manifest = {**content, "digest": content_digest(content)}
    with writing_folder(folder) as partial:
        # safetensors refuses tensors that share memory; an artifact's were cloned one by one.
        _put(partial / WEIGHTS, safetensors.torch.save(dict(artifact.state)))
        _put(partial / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False).encode())
    return folder


def content_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 over a manifest as plain JSON, without its own `digest`."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def artifact_folder(folder: Path) -> Path:
    """Where the artifact lies: `folder` itself, or the `final` of a run.

    Raises:
        StoreError: it is neither.
    """
    for place in (folder, folder / "final"):
        if (place / MANIFEST).is_file():
            return place
    raise StoreError(f"{folder}: holds no artifact and no run; give one that `slim run` wrote")


def load(folder: str | Path, *, trust: bool = False) -> Artifact:
    """The artifact in `folder`, rebuilt and compared with its digests. Executes nothing from the folder.

    Raises:
        StoreError: missing, truncated, edited, or written by a newer slim.
        BackboneError: a `package.module:factory` backbone without `trust`.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    history = tuple(_migrated(step, folder / MANIFEST) for step in manifest.history)
    state = read_tensors(folder / WEIGHTS)
    artifact = Artifact(manifest.backbone, state, history, manifest.labels, trust)
    if artifact.weights != manifest.weights:
        raise StoreError(
            f"{folder / WEIGHTS}: digest {artifact.weights[:12]} is not {manifest.weights[:12]} of {MANIFEST}; "
            "the weights were changed after saving, restore both files from one copy"
        )
    rebuild(artifact)
    return artifact


def rebuild(artifact: Artifact) -> nn.Module:
    """Backbone + every step's rewrite + values; a plain module on the CPU, in eval mode.

    Raises:
        StoreError: the history does not rebuild a network with these keys and shapes.
    """
    model = replay(artifact.backbone, artifact.history, trust=artifact.trust)
    try:
        model.load_state_dict(artifact.state, strict=True)
    except RuntimeError as error:
        raise StoreError(
            f"{artifact.backbone.name}: the history does not rebuild the network ({_line(error)}); "
            "use the versions that it names"
        ) from error
    return model.eval()


def replay(backbone: Backbone, history: tuple[Step, ...], *, trust: bool = False) -> nn.Module:
    """A freshly built network after every step's rewrite; its values are whatever the builders left.

    Raises:
        StoreError: a step that cannot be applied, because timm builds another network today.
    """
    from slim.passes import resolve

    model = backbone.build(trust=trust)
    for number, step in enumerate(history, 1):
        # What a rewrite raises on a network it was not planned for depends on the pass.
        try:
            model = resolve(step.name)(**step.config).rewrite(model, dict(step.plan))
        except Exception as error:
            raise StoreError(
                f"{backbone.name}: step {number} {step.name!r} cannot be applied again ({_line(error)}); "
                "use the versions that it names"
            ) from error
    return model


def traits(artifact: Artifact) -> frozenset[str]:
    """What the network is after every step of its history: `dense`, `float`, `supernet`."""
    from slim.passes import resolve

    current = FRESH
    for step in artifact.history:
        pass_class = resolve(step.name)
        current = (current - pass_class.drops) | pass_class.gives
    return current


def dropped_by(artifact: Artifact) -> dict[str, str]:
    """Trait -> the step of the history that ended it."""
    from slim.passes import resolve

    return {trait: step.name for step in artifact.history for trait in resolve(step.name).drops}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file.

    Raises:
        StoreError: missing or truncated.
    """
    if not path.is_file():
        raise StoreError(f"{path}: no such file")
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise StoreError(f"{path}: not a whole safetensors file ({error}); copy it again") from error


def write_text(path: Path, text: str) -> None:
    """Write beside and rename. Raises StoreError when the disk is full or the place not writable."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write beside and rename. Raises StoreError when the disk is full or the place not writable."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        _put(partial, data)
        partial.replace(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error.strerror}; nothing was replaced") from error
    finally:
        partial.unlink(missing_ok=True)


def _put(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def writing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place when the block ends well, and vanishes when it does not.

    Raises:
        StoreError: the disk is full, or the place not writable; what was there before is there still.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    except OSError as error:
        raise StoreError(f"{folder}: cannot be created: {error.strerror}") from error
    try:
        partial.chmod(0o777 & ~_umask())
        yield partial
        _replace(folder, partial)
    except OSError as error:
        raise StoreError(f"{folder}: cannot be written: {error.strerror}; nothing was replaced") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(folder: Path, new: Path) -> None:
    """Put `new` where `folder` is; when that fails, or is interrupted, the old folder is put back."""
    old = new.with_suffix(".replaced")
    if not folder.exists():
        new.rename(folder)
        return
    try:
        folder.rename(old)
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise StoreError(f"{folder}: holds no {MANIFEST}; an artifact is a folder with {MANIFEST} and {WEIGHTS}")
    try:
        data: dict[str, Any] = json.loads(path.read_bytes())
        written, recorded = data["format"], data.get("digest")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path}: not an artifact's {MANIFEST} ({error}); restore the file from a copy") from error
    if written != FORMAT:
        raise StoreError(f"{path}: format {written!r} is not {FORMAT!r}; use the slim that wrote it")
    digest = content_digest(data)
    if digest != recorded:
        raise StoreError(
            f"{path}: digest {digest[:12]} is not the recorded {str(recorded)[:12]}; "
            "the file was edited after saving, restore it from a copy"
        )
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise StoreError(f"{path}: {place}: {first['msg']}; use the slim that wrote it") from error


def _migrated(step: Step, path: Path) -> Step:
    from slim.passes import resolve

    try:
        pass_class = resolve(step.name)
    except RecipeError as error:
        raise StoreError(f"{path}: {error}") from error
    if step.version == pass_class.version:
        return step
    older = step.version < pass_class.version
    migrated = pass_class.migrate(step.version, dict(step.config), dict(step.plan)) if older else None
    if migrated is None:
        raise StoreError(
            f"{path}: step {step.name!r} has version {step.version}, this slim reads version "
            f"{pass_class.version}; use the slim that wrote it"
        )
    config, plan = migrated
    return step.model_copy(update={"version": pass_class.version, "config": config, "plan": plan})


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
