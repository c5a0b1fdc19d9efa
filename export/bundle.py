"""The bundle: one folder with the exported file and everything needed to serve it right.

    manifest.json    hash of every file, where the network comes from, versions, which file is served on which runtime
    model.onnx       what was measured on the run's target
    variants/        its other forms, where it is served in fewer bits: fp32, int8-s8, int8-u8; uint8-input if wanted
    preprocess.json  from an image file to the input, step by step        labels.json  names of outputs, or null
    io.json          names, types and shapes of inputs and outputs        scopes.json  ONNX node -> torch module
    golden.npz       a few inputs, and what torch and each file made of them
    parity.json      the differences of these                             lint.json    what each runtime objects to
    engines/         plans built for a device; see `add_engine`
    bench/           raw measurements, for each device
    predict.py       an example that needs onnxruntime, numpy and pillow only
    MODEL_CARD.md    the same for people

All but bench/ is the same to the last byte when the same network is bundled again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import jinja2
from torch import Tensor

from slim import environment
from slim.artifact import Artifact
from slim.errors import StoreError, UsageError
from slim.export import golden, quantized
from slim.export.bundle_files import (
    MANIFEST,
    MODEL,
    VARIANTS,
    GoldenEntry,
    Manifest,
    ModelEntry,
    PassEntry,
    Source,
    files_of,
    fingerprint,
    is_bundle,
    sealed,
    write_manifest,
)
from slim.export.golden import Golden
from slim.export.half import export_half
from slim.export.lint import ONNXRUNTIME, OPENVINO, TENSORRT, lint_file
from slim.export.onnx import OnnxFile, export_onnx
from slim.export.parity import GATES, Gate, difference, expected
from slim.export.preprocess import explicit_steps, normalised, pixels_of, with_preprocessing
from slim.export.runtime import runtimes
from slim.export.target import Target
from slim.measurement import Measurement
from slim.quantization import Quantization, quantization_of
from slim.store import write_bytes, write_text, writing_folder

CARD = "MODEL_CARD.md"
RULES = {"onnxruntime": ONNXRUNTIME, "openvino": OPENVINO, "tensorrt": TENSORRT}

FEWER_BITS = Gate(None, -1.0, 0.0)
"""Lets everything pass: a handful of images says little of fewer bits, and the run has judged them on many."""

TIMED = "latency_"
"""Beginning of the names of figures that are another each time; they are in bench/ alone."""


@dataclass(frozen=True)
class Form:
    """One of the files of the network."""

    file: OnnxFile
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    form: Literal["u8", "s8"] | None = None


def write_bundle(
    folder: Path,
    artifact: Artifact,
    onnx_file: OnnxFile,
    measurements: Mapping[str, Measurement],
    *,
    target: Target | None = None,
    images: Tensor | None = None,
    uint8_input: bool = False,
) -> Path:
    """Write `folder` beside its place and rename it; an older bundle there is replaced, anything else is not.

    Args:
        folder: the bundle.
        artifact: what `onnx_file` was exported from.
        onnx_file: in the form that `target` serves; goes into the bundle byte for byte.
        measurements: of that file, by metric.
        target: what they were taken on.
        images: (B, C, H, W) float32, as the network is fed; the first 8 are kept. Noise where none are given.
        uint8_input: add the same file with the preprocessing within the graph.

    Raises:
        UsageError: `folder` holds something that is not a bundle, or the file does not fit the artifact.
        StoreError: the exported file changed since, or the disk is full.
        ParityError: a file in 32 bits computes something else than the network.
        MissingExtra: ONNX Runtime is not installed.
    """
    if folder.exists() and not (folder.is_dir() and (is_bundle(folder) or not any(folder.iterdir()))):
        raise UsageError(f"{folder}: exists and is not a bundle (no {MANIFEST} of one); choose another place")
    data = _read(onnx_file)
    _check(artifact, onnx_file)
    fed = artifact.backbone.input
    with writing_folder(folder) as partial:
        write_bytes(partial / MODEL, data)
        forms = _forms(partial, artifact, onnx_file)
        if uint8_input:
            (partial / VARIANTS).mkdir(exist_ok=True)
            path = partial / VARIANTS / "model.uint8-input.onnx"
            forms[f"{VARIANTS}/{path.name}"] = replace(
                forms[MODEL], file=with_preprocessing(forms[MODEL].file, fed, path)
            )
        # Rounded to 8 bits, so that a graph that takes bytes is asked about the very same images.
        given = normalised(golden.noise(fed) if images is None else pixels_of(images[: golden.COUNT], fed), fed)
        found, apart = _compared(artifact, forms, given)
        write_example(partial, artifact, {name: form.file for name, form in forms.items()})
        golden.write_golden(partial / golden.GOLDEN, found)
        _put(partial / "scopes.json", {name: form.file.scopes for name, form in forms.items()})
        _put(partial / "parity.json", {"inputs": _kind(images), "target": golden.ORACLE, "files": apart})
        _put(partial / "lint.json", {name: _lint(form.file.path) for name, form in forms.items()})
        manifest = _manifest(artifact, forms, target, GoldenEntry(inputs=_kind(images), count=len(given)))
        said = {"steps": explicit_steps(fed), "apart": apart, "manifest": manifest, "file": onnx_file}
        said["figures"] = {name: one for name, one in measurements.items() if not name.startswith(TIMED)}
        write_text(partial / CARD, _render("model_card.md.jinja", **said))
        _bench(partial, measurements, target)
        files = {name: fingerprint(partial / name) for name in files_of(partial) if not name.startswith("bench/")}
        write_manifest(partial, manifest.model_copy(update={"files": files}))
    return folder


def write_example(folder: Path, artifact: Artifact, files: Mapping[str, OnnxFile]) -> None:
    """predict.py, and all it reads besides the model: preprocess.json, io.json, labels.json."""
    fed = artifact.backbone.input
    _put(folder / "preprocess.json", {**fed.model_dump(mode="json"), "steps": explicit_steps(fed)})
    _put(folder / "labels.json", artifact.labels)
    low, high = files[MODEL].batch_range
    ports = {
        name: {"inputs": [*map(dataclasses.asdict, one.inputs)], "outputs": [*map(dataclasses.asdict, one.outputs)]}
        for name, one in files.items()
    }
    _put(folder / "io.json", {"batch": {"min": low, "max": high}, "files": ports})
    write_text(folder / "predict.py", _render("predict.py.jinja", square=fed.size[1] == fed.size[2]))


def _check(artifact: Artifact, onnx_file: OnnxFile) -> None:
    fed, (source,), (output,) = artifact.backbone.input, onnx_file.inputs, onnx_file.outputs
    if source.shape[1:] != fed.size:
        raise UsageError(
            f"bundle: {onnx_file.path} takes {source.shape[1:]}, the network's preprocessing gives {fed.size}; "
            "export the file with the same preprocessing"
        )
    if artifact.labels is not None and len(artifact.labels) != output.shape[1]:
        raise UsageError(
            f"bundle: {len(artifact.labels)} labels for {output.shape[1]} outputs of {onnx_file.path}; "
            "the file was exported from another network, export this one"
        )


def _forms(folder: Path, artifact: Artifact, given: OnnxFile) -> dict[str, Form]:
    """Every form by its name in the bundle. Which one model.onnx is, its bytes tell: they are the same each time."""
    served, wanted = replace(given, path=folder / MODEL), quantization_of(artifact.history)
    if wanted is None:
        return {MODEL: Form(served)}
    (folder / VARIANTS).mkdir()
    forms: dict[str, Form] = {}
    for form in _written(folder / VARIANTS, artifact, wanted):
        if form.file.sha256 == given.sha256:
            form.file.path.unlink()
            forms[MODEL] = replace(form, file=served)
        else:
            forms[f"{VARIANTS}/{form.file.path.name}"] = form
    if MODEL not in forms:
        raise UsageError(
            f"bundle: {given.path} is none of {', '.join(forms)} of this network; it was exported from another one, or "
            "by other versions: export it again"
        )
    return {MODEL: forms.pop(MODEL), **forms}


def _written(folder: Path, artifact: Artifact, wanted: Quantization) -> list[Form]:
    model, fed = artifact.model(), artifact.backbone.input
    plain = export_onnx(model, folder / "model.fp32.onnx", fed)
    if wanted.precision == "fp16":
        return [Form(plain), Form(export_half(model, wanted.floats, folder / "model.fp16.onnx", fed), "fp16")]
    kinds: tuple[Literal["s8", "u8"], ...] = ("s8", "u8")
    paths = {form: folder / f"model.int8-{form}.onnx" for form in kinds}
    return [Form(plain), *(Form(quantized.write(plain, wanted, form, paths[form]), "int8", form) for form in kinds)]


def _compared(artifact: Artifact, forms: Mapping[str, Form], images: Tensor) -> tuple[Golden, dict[str, Any]]:
    """What the network and each file make of `images`, and how far a file is from the network."""
    fed = artifact.backbone.input
    with golden.on_one_thread():
        wanted = expected(artifact.model(), images)
        found = {name: golden.asked(form.file.path, images, fed) for name, form in forms.items()}
    apart = {}
    for name, form in forms.items():
        gate = GATES["fp32"] if form.precision == "fp32" else FEWER_BITS
        one = difference(wanted, found[name], place=f"bundle's {name}", against="torch", gate=gate)
        kept = {key: one.details[key] for key in ("mean_abs", "cosine", "top1_agreement")}
        apart[name] = {"precision": form.precision, "max_abs": one.value, **kept, "n": one.n}
    return Golden(images, pixels_of(images, fed), {golden.NETWORK: wanted, **found}), apart


def _manifest(artifact: Artifact, forms: Mapping[str, Form], target: Target | None, held: GoldenEntry) -> Manifest:
    backbone = artifact.backbone
    history = [PassEntry(name=step.name, version=step.version, config=step.config) for step in artifact.history]
    # One that serves no INT8, as torch, is served no ONNX file either.
    served = {name: _served(forms, one.form) for name, one in sorted(runtimes().items()) if one.form is not None}
    models = {
        name: ModelEntry(
            precision=form.precision,
            form=form.form,
            opset=form.file.opset,
            ir_version=form.file.ir_version,
            route=form.file.route,
        )
        for name, form in forms.items()
    }
    return Manifest(
        source=Source(
            name=backbone.name,
            kwargs=backbone.kwargs,
            num_classes=backbone.num_classes,
            digest=artifact.digest,
            weights=artifact.weights,
            history=tuple(history),
        ),
        versions=environment.versions(),
        target=str(target) if target else None,
        served=served,
        models=models,
        golden=held,
        files={},
    )


def _served(forms: Mapping[str, Form], form: str) -> str:
    """The file that a runtime is served, which writes INT8 in `form`."""
    return next((name for name, one in forms.items() if one.form == form), MODEL)


def _bench(folder: Path, measurements: Mapping[str, Measurement], target: Target | None) -> None:
    """The measurements as they are, with their samples, under the fingerprint of the device they were taken on."""
    if not measurements:
        return
    timed = sorted(measurements.values(), key=lambda one: not one.metric.startswith(TIMED))
    here = next((one.environment["fingerprint"] for one in timed if "fingerprint" in one.environment), None)
    measured = {name: one.model_dump(mode="json") for name, one in measurements.items()}
    content = {"format": "slim-bench/1", "target": str(target) if target else None, "measurements": measured}
    (folder / "bench").mkdir()
    write_text(folder / "bench" / f"{here or environment.fingerprint()}.json", sealed(content))


def _lint(path: Path) -> dict[str, Any]:
    return {name: [*map(dataclasses.asdict, lint_file(path, rules))] for name, rules in RULES.items()}


def _kind(images: Tensor | None) -> Literal["images", "noise"]:
    return "noise" if images is None else "images"


def _put(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _read(onnx_file: OnnxFile) -> bytes:
    try:
        data = onnx_file.path.read_bytes()
    except OSError as error:
        raise StoreError(f"{onnx_file.path}: cannot be read: {error.strerror}; export it again") from error
    if hashlib.sha256(data).hexdigest() != onnx_file.sha256:
        raise StoreError(f"{onnx_file.path}: changed since it was exported and measured; export it again")
    return data


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
