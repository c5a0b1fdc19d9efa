"""Artifacts on disk: `slim.json` + `weights.safetensors`, replayed, never unpickled.

Loading builds the backbone, applies every step's `rewrite` in order, loads the values strictly and compares the digest.
Everything is written beside its place and renamed, so a full disk or a Ctrl-C leaves the last good file whole.
"""

from __future__ import annotations

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
from slim.errors import StoreError

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
    digest: str
    history: tuple[Step, ...]


def save(artifact: Artifact, folder: str | Path) -> Path:
    """Write `artifact` as a folder; an existing one is replaced only when the new one is whole.

    Raises:
        StoreError: the disk is full, or the folder cannot be written.
    """
    folder = Path(folder)
    manifest = Manifest(
        format=FORMAT,
        backbone=artifact.backbone,
        labels=artifact.labels,
        weights=artifact.weights,
        digest=artifact.digest,
        history=artifact.history,
    )
    with writing_folder(folder) as partial:
        # `safetensors.torch.save` refuses tensors that share memory; an artifact's were cloned one by one.
        write_bytes(partial / WEIGHTS, safetensors.torch.save(dict(artifact.state)))
        write_text(partial / MANIFEST, manifest.model_dump_json(indent=1))
    return folder


def load(folder: str | Path, *, trust: bool = False) -> Artifact:
    """The artifact in `folder`, rebuilt and compared with its digests. Executes nothing from the folder.

    Raises:
        StoreError: missing, truncated, edited, or written by a newer slim.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    state = read_tensors(folder / WEIGHTS)
    history = tuple(_migrated(step, folder) for step in manifest.history)
    artifact = Artifact(manifest.backbone, state, history, manifest.labels, trust)
    if artifact.weights != manifest.weights:
        raise StoreError(
            f"{folder / WEIGHTS}: digest {artifact.weights[:12]} is not {manifest.weights[:12]} of {MANIFEST}; "
            "the weights were changed after saving, restore both files from one copy"
        )
    if artifact.digest != manifest.digest and history == manifest.history:
        raise StoreError(
            f"{folder / MANIFEST}: digest {artifact.digest[:12]} is not the recorded {manifest.digest[:12]}; "
            "the backbone or a plan was edited after saving, restore the file from a copy"
        )
    rebuild(artifact)
    return artifact


def rebuild(artifact: Artifact) -> nn.Module:
    """Backbone + every step's rewrite + values; a plain module on the CPU, in eval mode."""
    model = replay(artifact.backbone, artifact.history, trust=artifact.trust)
    try:
        model.load_state_dict(artifact.state, strict=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise StoreError(
            f"{artifact.backbone.name}: the history does not rebuild the saved network: {detail}"
        ) from error
    return model.eval()


def replay(backbone: Backbone, history: tuple[Step, ...], *, trust: bool = False) -> nn.Module:
    """A freshly built network after every step's rewrite; its values are whatever the builders left."""
    from slim.passes import resolve

    model = backbone.build(trust=trust)
    for step in history:
        model = resolve(step.name)(**step.config).rewrite(model, dict(step.plan))
    return model


def traits(artifact: Artifact) -> frozenset[str]:
    """What the network is after every step of its history: `dense`, `float`, `supernet`."""
    from slim.passes import resolve

    current = FRESH
    for step in artifact.history:
        pass_class = resolve(step.name)
        current = (current - pass_class.drops) | pass_class.gives
    return current


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
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error.strerror}; nothing was replaced") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def writing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place when the block ends well, and vanishes when it does not."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    except OSError as error:
        raise StoreError(f"{folder}: cannot be created: {error.strerror}") from error
    try:
        partial.chmod(0o777 & ~_umask())
        yield partial
        replaced = partial.with_suffix(".replaced")
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise StoreError(f"{folder}: cannot be written: {error.strerror}; nothing was replaced") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise StoreError(f"{folder}: holds no {MANIFEST}; an artifact is a folder with {MANIFEST} and {WEIGHTS}")
    try:
        data: Mapping[str, Any] = json.loads(path.read_bytes())
        if data["format"] != FORMAT:
            raise StoreError(f"{path}: format {data['format']!r} is not {FORMAT!r}; use the slim that wrote it")
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise StoreError(f"{path}: {place}: {first['msg']}; restore the file from a copy") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: not an artifact's {MANIFEST} ({error}); restore the file from a copy") from error


def _migrated(step: Step, folder: Path) -> Step:
    from slim.passes import resolve

    pass_class = resolve(step.name)
    if step.version == pass_class.version:
        return step
    migrated = pass_class.migrate(step.version, dict(step.config), dict(step.plan))
    if step.version > pass_class.version or migrated is None:
        raise StoreError(
            f"{folder / MANIFEST}: step {step.name!r} has version {step.version}, this slim reads version "
            f"{pass_class.version}; use the slim that wrote it"
        )
    config, plan = migrated
    return step.model_copy(update={"version": pass_class.version, "config": config, "plan": plan})
