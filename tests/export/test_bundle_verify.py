from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slim.artifact import Artifact, Backbone, Preprocessing, Step
from slim.errors import StoreError, TargetError, UsageError
from slim.export.bundle import write_bundle
from slim.export.bundle_files import MANIFEST, add_engine, engine_name, fingerprint, read_manifest, sealed
from slim.export.bundle_verify import verify
from slim.export.engine import ARCH, OS, PLAN, SIDECAR, Sidecar, read_engine
from slim.export.half import export_half
from slim.export.onnx import OnnxFile, export_onnx
from slim.export.quantized import structure, write
from slim.export.ranges import ranges
from slim.export.target import Target
from slim.measurement import Measurement
from slim.passes.quantize import Quantize
from slim.quantization import Quantization

INPUT = Preprocessing(size=(3, 32, 32))
BACKBONE = Backbone(name="test_efficientnet", num_classes=10, input=INPUT)
TARGET = Target.parse("ort:cpu")
FIGURES = {"latency_p50_ms": Measurement(metric="latency_p50_ms", value=1.5, unit="ms", samples=(1.0, 2.0))}
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def model(one_thread: None) -> nn.Module:
    return BACKBONE.build(seed=3)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(16, *INPUT.size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plain(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> OnnxFile:
    return export_onnx(model, tmp_path_factory.mktemp("verify") / "plain.onnx", INPUT)


@pytest.fixture(scope="module")
def quantized(model: nn.Module, plain: OnnxFile, images: Tensor) -> Artifact:
    known = ranges(plain, [images], "minmax", TARGET, 1)
    return served_in(model, Quantization(graph=structure(plain), method="minmax", ranges=known))


@pytest.fixture(scope="module")
def written(quantized: Artifact, plain: OnnxFile, images: Tensor) -> Path:
    """A bundle of a network in INT8, with every kind of file but an engine; not to be changed."""
    file = write(plain, quantization(quantized), "u8", plain.path.with_name("u8.onnx"))
    folder = plain.path.parent / "bundle"
    return write_bundle(folder, quantized, file, FIGURES, target=TARGET, images=images, uint8_input=True)


@pytest.fixture
def bundle(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "bundle"))


def served_in(model: nn.Module, setting: Quantization) -> Artifact:
    found = Quantize(precision=setting.precision)
    plan: dict[str, Any] = {"quantization": setting.model_dump(mode="json")}
    config = found.model_dump(mode="json")
    return Artifact.of(
        model, BACKBONE, history=(Step(name="quantize", version=found.version, config=config, plan=plan, seed=0),)
    )


def quantization(artifact: Artifact) -> Quantization:
    return Quantization.model_validate(artifact.history[0].plan["quantization"])


def faults(folder: Path) -> list[str]:
    return [fault for check in verify(folder) for fault in check.faults]


def forge(folder: Path, **changes: Any) -> None:
    """Write the manifest again with a digest that fits, as somebody who knows the format would."""
    content = {**json.loads((folder / MANIFEST).read_text()), **changes}
    del content["digest"]
    (folder / MANIFEST).write_text(sealed(content))


def rehash(folder: Path, name: str) -> None:
    entry = fingerprint(folder / name).model_dump()
    forge(folder, files={**json.loads((folder / MANIFEST).read_text())["files"], name: entry})


def sidecar(plan: bytes, onnx_sha256: str, **fields: Any) -> Sidecar:
    known = {"api": "trtexec", "version": "10.3.0", "gpu": "Orin", "compute_capability": "8.7", "driver": None}
    built = {"os": OS, "arch": ARCH, "options": {"batch": 1}, "timing_cache_sha256": None, "executed": False}
    identity = {"plan_sha256": hashlib.sha256(plan).hexdigest(), "size_bytes": len(plan), "onnx_sha256": onnx_sha256}
    return Sidecar.model_validate({**known, **built, **identity, **fields})


def sha256_of(bundle: Path, name: str = "model.onnx") -> str:
    return read_manifest(bundle).files[name].sha256


# Whole


def test_a_bundle_is_whole_as_it_was_written(written: Path) -> None:
    checks = verify(written)
    assert [check.name for check in checks] == ["files", "golden", "lint", "engines"]
    assert [check.faults for check in checks] == [()] * 4
    said = {check.name: check.said for check in checks}
    assert said["files"].endswith("in manifest.json, 1 of measurements")
    assert said["golden"].startswith("4 models on 8 inputs (images), largest difference ")
    assert said["lint"] == "model.onnx for ort:cpu, 0 warnings"
    assert said["engines"] == "none"


def test_every_form_is_there_and_each_runtime_has_its_own(written: Path, plain: OnnxFile) -> None:
    said = read_manifest(written)
    assert {name: (one.precision, one.form) for name, one in said.models.items()} == {
        "model.onnx": ("int8", "u8"),
        "variants/model.fp32.onnx": ("fp32", None),
        "variants/model.int8-s8.onnx": ("int8", "s8"),
        "variants/model.uint8-input.onnx": ("int8", "u8"),
    }
    assert (written / "model.onnx").read_bytes() == plain.path.with_name("u8.onnx").read_bytes()
    assert (written / "variants" / "model.fp32.onnx").read_bytes() == plain.path.read_bytes()
    assert said.served["ort:cpu"] == "model.onnx"
    assert said.served["openvino:cpu"] == said.served["ort:tensorrt"] == "variants/model.int8-s8.onnx"
    lint = json.loads((written / "lint.json").read_text())
    assert not lint["variants/model.int8-s8.onnx"]["tensorrt"]
    assert {one["rule"] for one in lint["model.onnx"]["tensorrt"]} >= {"zero-point"}
    found = json.loads((written / "parity.json").read_text())["files"]
    assert found["variants/model.fp32.onnx"]["max_abs"] < 1e-5 < found["model.onnx"]["max_abs"]


def test_half_precision_ships_with_the_file_in_32_bits(tmp_path: Path, model: nn.Module, plain: OnnxFile) -> None:
    half = export_half(model, (), tmp_path / "half.onnx", INPUT)
    folder = write_bundle(tmp_path / "b", served_in(model, Quantization(precision="fp16")), half, {})
    said = read_manifest(folder)
    assert {name: one.precision for name, one in said.models.items()} == {
        "model.onnx": "fp16",
        "variants/model.fp32.onnx": "fp32",
    }
    assert set(said.served.values()) == {"model.onnx"}
    assert said.golden.inputs == "noise"
    assert not faults(folder)


def test_a_file_that_is_no_form_of_the_network_is_not_bundled(
    tmp_path: Path, quantized: Artifact, plain: OnnxFile
) -> None:
    setting = quantization(quantized)
    wider = setting.model_copy(update={"ranges": {key: (2 * a, 2 * b) for key, (a, b) in setting.ranges.items()}})
    other = write(plain, wider, "u8", tmp_path / "other.onnx")
    with pytest.raises(UsageError, match=r"other\.onnx is none of variants/model\.fp32\.onnx, .* export it again"):
        write_bundle(tmp_path / "b", quantized, other, {})
    # The one in 32 bits is: it is what is measured where nothing serves fewer.
    said = read_manifest(write_bundle(tmp_path / "b", quantized, plain, {}))
    assert said.models["model.onnx"].precision == "fp32"
    assert said.served["ort:cpu"] == "variants/model.int8-u8.onnx"


# Faults


def test_a_bit_turned_over_anywhere_is_found(bundle: Path) -> None:
    for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
        data = path.read_bytes()
        path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
        if path.name == MANIFEST:
            with pytest.raises(StoreError, match=r"not a bundle's manifest|so it was edited; write the bundle again"):
                verify(bundle)
        else:
            (found,) = faults(bundle)
            assert path.relative_to(bundle).as_posix() in found
        path.write_bytes(data)


def test_missing_and_unaccounted_files_are_named(bundle: Path, tmp_path: Path) -> None:
    (bundle / "variants" / "model.int8-s8.onnx").unlink()
    (bundle / "notes.txt").write_text("mine")
    (bundle / "bench" / "more.json").write_text("{}")
    assert faults(bundle) == [
        "variants/model.int8-s8.onnx is missing",
        "notes.txt is not in manifest.json",
        "bench/more.json is not in manifest.json",
    ]


def test_links_are_never_followed(bundle: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.json"
    shutil.move(bundle / "labels.json", elsewhere)
    (bundle / "labels.json").symlink_to(elsewhere)  # with the very content that the manifest names
    shutil.move(bundle / "variants", tmp_path / "variants")
    (bundle / "variants").symlink_to(tmp_path / "variants")
    found = faults(bundle)
    assert "labels.json is a link or behind one; a bundle holds files alone" in found
    assert "variants/model.fp32.onnx is a link or behind one; a bundle holds files alone" in found
    assert "variants is not in manifest.json" in found


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/hostname", "a/../labels.json", "./labels.json", "a\\b", ""])
def test_a_manifest_that_leads_outside_opens_nothing(bundle: Path, name: str) -> None:
    outside = bundle.parent / "outside.txt"
    outside.write_text("not the bundle's")
    entry = fingerprint(outside).model_dump()
    forge(bundle, files={**json.loads((bundle / MANIFEST).read_text())["files"], name: entry})
    assert faults(bundle) == [f"{name!r} is no place inside the bundle"]


def test_a_model_that_computes_something_else_is_found_though_its_hash_fits(bundle: Path) -> None:
    shutil.copy(bundle / "variants" / "model.fp32.onnx", bundle / "variants" / "before.onnx")
    other = export_onnx(BACKBONE.build(seed=4), bundle / "variants" / "model.fp32.onnx", INPUT)
    assert other.path.exists()
    (bundle / "variants" / "before.onnx").unlink()
    rehash(bundle, "variants/model.fp32.onnx")
    (found,) = faults(bundle)
    assert found.startswith("parity: variants/model.fp32.onnx differs from its recorded outputs in golden.npz by")


def test_golden_values_that_are_gone_or_unreadable_are_found(bundle: Path) -> None:
    with np.load(bundle / "golden.npz") as packed:
        kept: dict[str, Any] = {name: packed[name] for name in packed.files if name != "logits/model.onnx"}
    np.savez(bundle / "golden.npz", **kept)
    rehash(bundle, "golden.npz")
    assert faults(bundle) == ["golden.npz holds no outputs of model.onnx"]
    (bundle / "golden.npz").write_bytes(b"PK")
    rehash(bundle, "golden.npz")
    (found,) = faults(bundle)
    assert "golden.npz: holds no inputs and outputs" in found


def test_what_the_runtime_of_the_target_refuses_is_found(bundle: Path) -> None:
    forge(bundle, target="ort:tensorrt", served={"ort:tensorrt": "model.onnx"})
    found = faults(bundle)
    assert found
    assert all(one.startswith("model.onnx: error: ") for one in found)
    forge(bundle, target="runtime-of-tomorrow")
    assert {check.name: check.said for check in verify(bundle)}["lint"].startswith("not done, for the target is unkn")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": "slim-bundle/9", "digest": ""}', r"format 'slim-bundle/9' is not 'slim-bundle/2'; use the slim"),
        ('{"format": "slim-bundle/2"}', r"not a bundle's manifest \(KeyError\('digest'\)\); write the bundle again"),
        ("[]", r"not a bundle's manifest \(TypeError"),
        (sealed({"format": "slim-bundle/2"}), r"manifest\.json: source: Field required; use the slim that wrote it"),
    ],
)
def test_a_manifest_that_is_none_is_refused_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(StoreError, match=message) as caught:
        verify(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_older_bundle_and_no_bundle_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"manifest\.json: cannot be read: No such file or directory; give a bundle"):
        verify(tmp_path)
    (tmp_path / "bundle.json").write_text('{"format": "slim-bundle/1"}')
    with pytest.raises(StoreError, match=r"bundle\.json: a bundle of format slim-bundle/1; write it again with `slim"):
        verify(tmp_path)


# Engines


def test_an_engine_is_added_and_accounted_for(bundle: Path) -> None:
    plan = b"ftrt" + bytes(20) + bytes([10, 3, 0, 26]) + b"layers"
    known = sidecar(plan, sha256_of(bundle))
    path = add_engine(bundle, plan, known)
    assert path == bundle / engine_name(known) / PLAN
    assert path.parent.name.startswith("trtexec-")
    assert add_engine(bundle, plan, known) == path
    assert {f"{engine_name(known)}/{name}" for name in (PLAN, SIDECAR)} <= read_manifest(bundle).files.keys()
    other = add_engine(bundle, plan, sidecar(plan, sha256_of(bundle), gpu="Thor", arch="other"))
    assert other != path
    checks = verify(bundle)
    assert not [check for check in checks if check.faults]
    assert "for another device (Thor, " in checks[-1].said


def test_an_engine_for_another_device_or_version_is_refused_before_anybody_gets_its_bytes(bundle: Path) -> None:
    plan = b"ftrt" + bytes(20) + bytes([10, 3, 0, 26]) + b"layers"
    known = sidecar(plan, sha256_of(bundle))
    folder = add_engine(bundle, plan, known).parent
    wanted = known.model_dump(include={"onnx_sha256", "api", "version", "gpu", "compute_capability", "options"})
    assert read_engine(folder, **wanted) == plan
    for change in ({"gpu": "Thor"}, {"version": "10.4.0"}, {"compute_capability": "9.0"}, {"arch": "other"}):
        with pytest.raises(TargetError, match=r"an engine runs only on the runtime and device it was built for"):
            read_engine(folder, **{**wanted, **change})


def test_an_engine_of_another_file_is_not_added(bundle: Path) -> None:
    before = (bundle / MANIFEST).read_bytes()
    with pytest.raises(StoreError, match=r"built from the file 0{12}, which is none of the bundle's; build it from m"):
        add_engine(bundle, b"plan", sidecar(b"plan", "0" * 64))
    with pytest.raises(StoreError, match=r"engine\.plan: 5 bytes, 4 in engine\.json"):
        add_engine(bundle, b"plan!", sidecar(b"plan", sha256_of(bundle)))
    assert (bundle / MANIFEST).read_bytes() == before
    assert not faults(bundle)


def test_an_engine_that_was_changed_or_moved_is_found(bundle: Path) -> None:
    known = sidecar(b"plan", sha256_of(bundle))
    path = add_engine(bundle, b"plan", known)
    path.write_bytes(b"evil")
    assert [one.split(" has ")[0] for one in faults(bundle)] == [f"{engine_name(known)}/{PLAN}"]
    rehash(bundle, f"{engine_name(known)}/{PLAN}")
    (found,) = faults(bundle)
    assert "the plan was changed, never load it" in found


# The command


def test_the_command_says_what_is_wrong_and_ends_with_1(call: Any, written: Path, bundle: Path) -> None:
    said = call("bundle", "verify", written)
    assert (said.code, said.err) == (0, "")
    assert [line.split()[0] for line in said.out.splitlines()] == ["files", "golden", "lint", "engines"]
    (bundle / "labels.json").write_text("[]")
    said = call("bundle", "verify", bundle)
    assert said.code == 1
    assert said.error.startswith(f"{bundle}: labels.json has sha256 ")
    assert "; 1 wrong" in said.out.splitlines()[0]
    found = json.loads(call("bundle", "verify", "--json", bundle).out)
    assert [(one["name"], len(one["faults"])) for one in found][:2] == [("files", 1), ("golden", 0)]
    said = call("bundle", "verify", bundle / "variants")
    assert (said.code, said.error.endswith("give a bundle that slim wrote")) == (1, True)


def test_a_file_is_bundled_in_the_form_that_its_name_says(written: Path, plain: OnnxFile, quantized: Artifact) -> None:
    again = write(plain, quantization(quantized), "s8", plain.path.with_name("s8.onnx"))
    assert sha256_of(written, "variants/model.int8-s8.onnx") == again.sha256
