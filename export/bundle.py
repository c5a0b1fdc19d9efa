"""The bundle: one folder with the exported file and everything needed to serve it right.

    model.onnx    the network
    bundle.json   preprocessing as explicit steps, labels, inputs and outputs, history, hashes, versions, figures
    predict.py    an example that needs onnxruntime, numpy and pillow only
    README.md     the same for people

Only `measurements` depends on where and when it was made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from slim import environment
from slim.artifact import Artifact, Preprocessing
from slim.errors import StoreError, UsageError
from slim.export.onnx import OnnxFile
from slim.measurement import Measurement
from slim.store import write_bytes, write_text, writing_folder

FORMAT = "slim-bundle/1"
MANIFEST = "bundle.json"
MODEL = "model.onnx"

MODES = {1: "L", 3: "RGB"}
"""Channels -> Pillow's image mode."""

RAW = ("samples", "predictions")
"""Beginnings of the keys under which a measurement keeps one entry per call or image; the run's report has those."""


def write_bundle(
    folder: Path, artifact: Artifact, onnx_file: OnnxFile, measurements: Mapping[str, Measurement]
) -> Path:
    """Write `folder` beside its place and rename it; an older bundle there is replaced, anything else is not.

    Raises:
        UsageError: `folder` holds something that is not a bundle, or the file does not fit the artifact.
        StoreError: the exported file changed since, or the disk is full.
    """
    if folder.exists() and not (folder.is_dir() and ((folder / MANIFEST).is_file() or not any(folder.iterdir()))):
        raise UsageError(f"{folder}: exists and is not a bundle (no {MANIFEST}); choose another place")
    data = _read(onnx_file)
    bundle = _describe(artifact, onnx_file, measurements)
    with writing_folder(folder) as partial:
        write_bytes(partial / MODEL, data)
        square = bundle["preprocessing"]["size"][1] == bundle["preprocessing"]["size"][2]
        write_text(partial / "predict.py", _render("predict.py.jinja", square=square))
        write_text(
            partial / "README.md", _render("bundle_readme.md.jinja", bundle=bundle, measurements=dict(measurements))
        )
        files = {path.name: _fingerprint(path) for path in sorted(partial.iterdir())}
        write_text(partial / MANIFEST, json.dumps(bundle | {"files": files}, indent=1, allow_nan=False) + "\n")
    return folder


def explicit_steps(preprocessing: Preprocessing) -> list[dict[str, Any]]:
    """Every step from an image file to the input tensor, in order; sizes are (height, width) in pixels.

    The same arithmetic as timm's evaluation transform with a centre crop: a square input resizes the short side to
    floor(size / crop) and cuts the long side down to whole pixels; any other resizes until both sides are covered, and
    rounds.

    Raises:
        UsageError: neither 1 nor 3 channels.
    """
    channels, height, width = preprocessing.size
    if channels not in MODES:
        raise UsageError(f"bundle: an input of {channels} channels is not an image file's; 1 or 3 are")
    target = [math.floor(side / preprocessing.crop) for side in (height, width)]
    size = {"short_side": target[0]} if height == width else {"cover": target}
    return [
        {"op": "convert", "mode": MODES[channels]},
        {"op": "resize", **size, "interpolation": preprocessing.interpolation},
        {"op": "center_crop", "size": [height, width]},
        {"op": "divide", "by": 255},
        {"op": "normalize", "mean": list(preprocessing.mean), "std": list(preprocessing.std)},
        {"op": "layout", "order": "NCHW", "dtype": "float32"},
    ]


def _describe(artifact: Artifact, onnx_file: OnnxFile, measurements: Mapping[str, Measurement]) -> dict[str, Any]:
    backbone, (source,), (output,) = artifact.backbone, onnx_file.inputs, onnx_file.outputs
    if source.shape[1:] != backbone.input.size:
        raise UsageError(
            f"bundle: {onnx_file.path} takes {source.shape[1:]}, the network's preprocessing gives "
            f"{backbone.input.size}; export the file with the same preprocessing"
        )
    if artifact.labels is not None and len(artifact.labels) != output.shape[1]:
        raise UsageError(
            f"bundle: {len(artifact.labels)} labels for {output.shape[1]} outputs of {onnx_file.path}; "
            "the file was exported from another network, export this one"
        )
    return {
        "format": FORMAT,
        "model": {"name": backbone.name, "num_classes": backbone.num_classes, "digest": artifact.digest},
        "input": dataclasses.asdict(source),
        "output": dataclasses.asdict(output),
        "batch": {"min": onnx_file.batch_range[0], "max": onnx_file.batch_range[1]},
        "opset": onnx_file.opset,
        "ir_version": onnx_file.ir_version,
        "preprocessing": {**backbone.input.model_dump(mode="json"), "steps": explicit_steps(backbone.input)},
        "labels": artifact.labels,
        "history": [{"name": step.name, "version": step.version, "config": step.config} for step in artifact.history],
        "measurements": {name: _figures(measured) for name, measured in measurements.items()},
        "versions": environment.versions(),
    }


def _figures(value: Any) -> Any:
    """A measurement's JSON without its raw samples, at any depth."""
    if isinstance(value, Measurement):
        return _figures(value.model_dump(mode="json"))
    if isinstance(value, dict):
        return {key: _figures(inner) for key, inner in value.items() if not key.startswith(RAW)}
    return [_figures(inner) for inner in value] if isinstance(value, list) else value


def _read(onnx_file: OnnxFile) -> bytes:
    try:
        data = onnx_file.path.read_bytes()
    except OSError as error:
        raise StoreError(f"{onnx_file.path}: cannot be read: {error.strerror}; export it again") from error
    if hashlib.sha256(data).hexdigest() != onnx_file.sha256:
        raise StoreError(f"{onnx_file.path}: changed since it was exported and measured; export it again")
    return data


def _fingerprint(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _render(template: str, **values: Any) -> str:
    # Undefined names are errors, so a template cannot drift from the manifest unseen. Nothing here is HTML.
    jinja = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    source = resources.files("slim.export").joinpath(template).read_text(encoding="utf-8")
    return jinja.from_string(source).render(**values)
