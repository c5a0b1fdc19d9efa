"""The files of a bundle: the manifest that accounts for them, and engines that are added later.

Every file is in the manifest with its hash, but for the manifest and what lies in bench/: these carry their own. So the
manifest is the same whenever the same network is bundled, however long its latency was measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from slim.errors import StoreError
from slim.export.engine import PLAN, SIDECAR, Sidecar, write_engine
from slim.store import content_digest, write_text

FORMAT: Final = "slim-bundle/2"
MANIFEST = "manifest.json"
MANIFEST_BEFORE = "bundle.json"
"""Of format slim-bundle/1."""

MODEL = "model.onnx"
VARIANTS = "variants"
ENGINES = "engines"
BENCH = re.compile(r"bench/[0-9a-f]{12}\.json")
"""Files of bench/, named after the device's fingerprint."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class FileEntry(_Section):
    """A file, but for its name."""

    sha256: Sha256
    bytes: int = Field(ge=0)


class PassEntry(_Section):
    """A pass that the network went through."""

    name: str
    version: int
    config: dict[str, JsonValue]
    """Every field of the pass."""


class Source(_Section):
    """Where the network comes from."""

    name: str
    """timm's, or `package.module:factory`."""
    kwargs: dict[str, JsonValue]
    num_classes: int
    digest: Sha256
    """Of the artifact: structure and values."""
    weights: Sha256
    """Of the values."""
    history: tuple[PassEntry, ...]


class ModelEntry(_Section):
    """A form of the network as ONNX."""

    precision: Literal["fp32", "fp16", "int8"]
    form: Literal["u8", "s8"] | None
    """How INT8 is written; see export/quantized.py."""
    opset: int
    ir_version: int
    route: str
    """How it was traced."""


class GoldenEntry(_Section):
    """What golden.npz holds."""

    inputs: Literal["images", "noise"]
    """`images` of the run's data; `noise` where it had none."""
    count: int


class Manifest(_Section):
    """manifest.json."""

    format: Literal["slim-bundle/2"] = FORMAT
    source: Source
    versions: dict[str, str]
    """Of slim and the libraries that wrote the bundle."""
    target: str | None
    """What model.onnx was measured on, in the words of `--target`; none where nothing was."""
    served: dict[str, str]
    """Runtime -> the file that it is served."""
    models: dict[str, ModelEntry]
    golden: GoldenEntry
    files: dict[str, FileEntry]


def is_bundle(folder: Path) -> bool:
    """Whether slim wrote `folder` as a bundle, of this format or another."""
    for name in (MANIFEST, MANIFEST_BEFORE):
        try:
            written = json.loads((folder / name).read_bytes())["format"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if str(written).startswith("slim-bundle/"):
            return True
    return False


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the bundle in `folder`.

    Raises:
        StoreError: missing, cut short, edited, or of another format.
    """
    path, before = folder / MANIFEST, folder / MANIFEST_BEFORE
    if not path.is_file() and before.is_file():
        raise StoreError(f"{before}: a bundle of format slim-bundle/1; write it again with `slim export`")
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        written, recorded = content["format"], content["digest"]
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}; give a bundle that slim wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: not a bundle's manifest ({error!r}); write the bundle again") from error
    if written != FORMAT:
        raise StoreError(f"{path}: format {written!r} is not {FORMAT!r}; use the slim that wrote it")
    if content_digest(content) != recorded:
        raise StoreError(f"{path}: does not have its recorded digest, so it was edited; write the bundle again")
    del content["digest"]
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise StoreError(f"{path}: {place}: {first['msg']}; use the slim that wrote it") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest beside its place and rename it."""
    write_text(folder / MANIFEST, sealed(manifest.model_dump(mode="json")))


def sealed(content: Mapping[str, Any]) -> str:
    """`content` as JSON with a digest of itself."""
    return json.dumps({**content, "digest": content_digest(content)}, indent=1, allow_nan=False) + "\n"


def fingerprint(path: Path) -> FileEntry:
    """Hash and size of the file at `path`."""
    data = path.read_bytes()
    return FileEntry(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def files_of(folder: Path) -> Iterator[str]:
    """Every file and link below `folder`, relative, in order; links are not followed."""
    for root, folders, files in os.walk(folder):
        folders.sort()
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in sorted([*files, *links]):
            yield (Path(root) / name).relative_to(folder).as_posix()


def fault_of(folder: Path, name: str, entry: FileEntry) -> str | None:
    """What is wrong with the file `name` of the bundle in `folder`; none where it is what the manifest says.

    A name that leads outside is never opened.
    """
    parts = PurePosixPath(name).parts
    if not parts or "/".join(parts) != name or ".." in parts or "\\" in name or "\0" in name or ":" in parts[0]:
        return f"{name!r} is no place inside the bundle"
    path = folder / name
    if any(folder.joinpath(*parts[:depth]).is_symlink() for depth in range(1, len(parts) + 1)):
        return f"{name} is a link or behind one; a bundle holds files alone"
    if not path.is_file():
        return f"{name} is missing"
    try:
        found = fingerprint(path)
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    if found != entry:
        has, said = (f"sha256 {one.sha256[:12]} and {one.bytes} bytes" for one in (found, entry))
        return f"{name} has {has}, not {said}"
    return None


def add_engine(bundle: Path, plan: bytes, sidecar: Sidecar) -> Path:
    """Put an engine into the bundle and return the plan's path; one for the same device and options is replaced.

    Cut short between the two, the engine is there and the manifest does not know it; adding it again mends that.

    Raises:
        StoreError: no bundle, an engine of a file that it does not hold, a sidecar of another plan, or a full disk.
        TargetError: the plan's header names another runtime or version than the sidecar.
    """
    manifest = read_manifest(bundle)
    if sidecar.onnx_sha256 not in {manifest.files[name].sha256 for name in manifest.models if name in manifest.files}:
        raise StoreError(
            f"{bundle}: the engine was built from the file {sidecar.onnx_sha256[:12]}, which is none of the bundle's; "
            f"build it from {' or '.join(manifest.models)}"
        )
    name = engine_name(sidecar)
    path = write_engine(bundle / name, plan, sidecar)
    added = {f"{name}/{file}": fingerprint(bundle / name / file) for file in (PLAN, SIDECAR)}
    files = dict(sorted({**manifest.files, **added}.items()))
    write_manifest(bundle, manifest.model_copy(update={"files": files}))
    return path


def engine_name(sidecar: Sidecar) -> str:
    """Folder of an engine: its runtime, and twelve digits for all that must match before it is loaded."""
    kept = {"onnx_sha256", "api", "version", "gpu", "compute_capability", "os", "arch", "options"}
    known = json.dumps(sidecar.model_dump(mode="json", include=kept), sort_keys=True)
    return f"{ENGINES}/{sidecar.api}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
