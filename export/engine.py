"""An engine on disk: the plan a runtime built from an ONNX file, and a sidecar that says from what, by what, for what.

    engine.plan   the bytes the runtime deserialises
    engine.json   the sidecar; it holds no paths

A plan is input that a runtime executes, and only the runtime and device it was built for can. So the sidecar, the hash
and the plan's own header are compared before anybody gets the bytes.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from slim.errors import StoreError, TargetError
from slim.store import content_digest, write_bytes, write_text, writing_folder

FORMAT: Final = "slim-engine/1"
PLAN = "engine.plan"
SIDECAR = "engine.json"

OS = platform.system()
ARCH = platform.machine()

TAGS = {b"ftrt": "tensorrt", b"vtrt": "tensorrt_rtx"}
"""First bytes of a plan -> the runtime that wrote it. `ftrt`: NVIDIA/TensorRT samples/common/sampleEngines.cpp, 10.3 to
11.1; `vtrt`: plans that TensorRT-RTX 1.7 wrote."""

FAMILY = {"tensorrt": "tensorrt", "trtexec": "tensorrt", "tensorrt_rtx": "tensorrt_rtx"}
"""`api` of a sidecar -> the runtime whose plans it builds."""

HEADER_BYTES = 28

NUMBERS = r"^\d+(\.\d+)*"
"""The numbers that a version begins with."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Sidecar(BaseModel):
    """engine.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    format: Literal["slim-engine/1"] = FORMAT
    onnx_sha256: Sha256
    """Of the ONNX file the plan was built from."""
    plan_sha256: Sha256
    """Of the plan."""
    size_bytes: int = Field(ge=1)
    """Of the plan."""
    api: Literal["tensorrt", "tensorrt_rtx", "trtexec", "openvino"]
    """What built it."""
    version: str = Field(pattern=NUMBERS)
    """Of that runtime: `10.3.0`, or with a build number behind it."""
    gpu: str | None
    """Name of the GPU it was built on; none where it was built without one."""
    compute_capability: str | None
    """Of the GPU it was built for: `8.7`."""
    driver: str | None
    """Version of the GPU's driver when it was built; a newer one runs the plan as well, so it is not compared."""
    os: str
    """As `uname -s` has it: `Linux`."""
    arch: str
    """As `uname -m` has it: `aarch64`."""
    options: dict[str, JsonValue]
    """Everything else that was asked of the builder."""
    timing_cache_sha256: Sha256 | None
    """Of the timing cache the builder began with."""
    executed: bool
    """Whether this plan ever ran; a plan can be built on a machine that cannot run it."""


class PlanVersion(NamedTuple):
    """What a plan's own header says."""

    runtime: str
    """`tensorrt` or `tensorrt_rtx`."""
    version: tuple[int, ...]
    """Major, minor, patch, build."""


def sniff_version(plan: bytes) -> PlanVersion | None:
    """The runtime and version in the header of `plan`. None for any layout not known here: that says nothing of it."""
    runtime = TAGS.get(plan[:4])
    # Bytes 4 to 7 are the version of the layout; only 0 is known.
    if runtime is None or len(plan) < HEADER_BYTES or any(plan[4:8]):
        return None
    return PlanVersion(runtime, tuple(plan[24:HEADER_BYTES]))


def write_engine(folder: Path, plan: bytes, sidecar: Sidecar) -> Path:
    """Write `plan` and `sidecar` as `folder` and return the plan's path. An older engine there is replaced.

    Raises:
        StoreError: the sidecar is another plan's, the place is taken or not writable, or the disk is full.
        TargetError: the plan's header names another runtime or version than the sidecar.
    """
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= {PLAN, SIDECAR}):
        raise StoreError(f"{folder}: exists and is not an engine; choose another place")
    _check_content(folder / PLAN, plan, sidecar)
    content = sidecar.model_dump(mode="json")
    with writing_folder(folder) as partial:
        write_bytes(partial / PLAN, plan)
        document = content | {"digest": content_digest(content)}
        write_text(partial / SIDECAR, json.dumps(document, indent=1, allow_nan=False) + "\n")
    return folder / PLAN


def read_sidecar(folder: Path) -> Sidecar:
    """What is known of the engine in `folder`. The plan is not looked at.

    Raises:
        StoreError: missing, cut short, edited, or of another format.
    """
    path = folder / SIDECAR
    data = _read(path)
    try:
        content: dict[str, Any] = json.loads(data)
        written, recorded = content["format"], content["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: not an engine's sidecar ({error!r}); build the engine again") from error
    if written != FORMAT:
        raise StoreError(f"{path}: format {written!r} is not {FORMAT!r}; use the slim that wrote it")
    if content_digest(content) != recorded:
        raise StoreError(f"{path}: does not have its recorded digest, so it was edited; build the engine again")
    del content["digest"]
    try:
        return Sidecar.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise StoreError(f"{path}: {place}: {first['msg']}; use the slim that wrote it") from error


def read_engine(
    folder: Path,
    *,
    onnx_sha256: str,
    api: str,
    version: str,
    gpu: str | None,
    compute_capability: str | None,
    options: Mapping[str, Any],
    os: str = OS,
    arch: str = ARCH,
) -> bytes:
    """The plan in `folder`, when it is just the one that would be built now; `os` and `arch` are this machine's.

    Raises:
        StoreError: missing, cut short, edited, or built from another file or with other options.
        TargetError: built by another runtime or version, or for another device.
    """
    sidecar, path = read_sidecar(folder), folder / SIDECAR
    if sidecar.onnx_sha256 != onnx_sha256:
        raise StoreError(
            f"{path}: built from the file {sidecar.onnx_sha256[:12]}, wanted is {onnx_sha256[:12]}; "
            "build the engine again from this file"
        )
    device = {"os": os, "arch": arch, "gpu": gpu, "compute_capability": compute_capability}
    for name, wanted in {"api": api, "version": version, **device}.items():
        if (found := getattr(sidecar, name)) != wanted:
            raise TargetError(
                f"{path}: {name} is {found!r}, wanted is {wanted!r}; an engine runs only on the runtime and device it "
                "was built for, build it again here"
            )
    for name in sorted({*sidecar.options, *options}):
        built, asked = (_word(values, name) for values in (sidecar.options, options))
        if built != asked:
            raise StoreError(
                f"{path}: built with option {name}={built}, wanted is {asked}; build the engine again with the options"
            )
    plan = _read(folder / PLAN)
    _check_content(folder / PLAN, plan, sidecar)
    return plan


def _check_content(path: Path, plan: bytes, sidecar: Sidecar) -> None:
    if len(plan) != sidecar.size_bytes:
        raise StoreError(
            f"{path}: {len(plan)} bytes, {sidecar.size_bytes} in {SIDECAR}; not the whole plan, build it again"
        )
    found = hashlib.sha256(plan).hexdigest()
    if found != sidecar.plan_sha256:
        raise StoreError(
            f"{path}: sha256 {found[:12]} is not {sidecar.plan_sha256[:12]} of {SIDECAR}; "
            "the plan was changed, never load it, build it again"
        )
    header = sniff_version(plan)
    if header is None:
        return
    wrote = f"{header.runtime} {'.'.join(map(str, header.version))}"
    if header.runtime != FAMILY.get(sidecar.api):
        raise TargetError(f"{path}: a plan of {wrote}, {sidecar.api} cannot run it; build it again here")
    # A sidecar may leave the build number out, and the header has one byte for each part.
    numbers = re.match(NUMBERS, sidecar.version)
    assert numbers  # the sidecar was validated
    stated = tuple(int(part) % 256 for part in numbers[0].split("."))
    if header.version[: len(stated)] != stated[: len(header.version)]:
        raise TargetError(f"{path}: a plan of {wrote}, {SIDECAR} says {sidecar.version}; build it again here")


def _word(options: Mapping[str, Any], name: str) -> str:
    return json.dumps(options[name], sort_keys=True) if name in options else "absent"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}; build the engine again") from error
