from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn

from slim import environment
from slim.artifact import Artifact, Backbone, Preprocessing, Step
from slim.errors import ParityError, StoreError, UsageError
from slim.export.bundle import write_bundle, write_example
from slim.export.onnx import OnnxFile, Port, export_onnx
from slim.export.parity import parity
from slim.export.target import Target
from slim.measurement import Measurement

PHOTO = Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"  # 640 x 427, a real photograph
LABELS = tuple(f"kind {number} of temple" for number in range(10))
INPUT = Preprocessing(size=(3, 64, 64), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), crop=0.9)
BACKBONE = Backbone(name="test_efficientnet", num_classes=10, input=INPUT)
TARGET = Target.parse("ort:cpu")
STEP = Step(name="finetune", version=3, config={"epochs": 2}, plan={}, seed=0)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return BACKBONE.build(seed=3)


@pytest.fixture(scope="module")
def exported(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> OnnxFile:
    return export_onnx(model, tmp_path_factory.mktemp("bundle") / "exported.onnx", INPUT)


@pytest.fixture(scope="module")
def artifact(model: nn.Module) -> Artifact:
    # A pass that leaves the structure alone: what it did is in the values, and the network is built without it.
    return Artifact.of(model, BACKBONE, labels=LABELS, history=(STEP,))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(4, *INPUT.size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bundle(
    model: nn.Module, exported: OnnxFile, artifact: Artifact, images: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    accuracy = Measurement(
        metric="accuracy_top1",
        value=75,
        unit="percent",
        n=4,
        low=30.1,
        high=95.4,
        statistic="mean",
        target=str(TARGET),
        samples=(1, 1, 1, 0),
        details={"predictions": [1, 2, 3, 3], "side": {"samples_ms": [1.0, 2.0], "top5": 99.5}},
    )
    figures = {"parity_max_abs": parity(model, exported.path, images, target=TARGET), "accuracy_top1": accuracy}
    folder = tmp_path_factory.mktemp("out") / "bundle"
    return write_bundle(folder, artifact, exported, figures, target=TARGET, images=images)


def read(folder: Path, name: str = "manifest") -> Any:
    return json.loads((folder / f"{name}.json").read_text())


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def predict(folder: Path, *images: Path) -> subprocess.CompletedProcess[str]:
    # -I: neither the working directory nor the environment may lend it a module.
    command = [sys.executable, "-I", str(folder / "predict.py"), *map(str, images)]
    return subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, check=False)


def timm_input(image: Image.Image, preprocessing: Preprocessing) -> torch.Tensor:
    transform = create_transform(
        preprocessing.size,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=preprocessing.crop,
    )
    tensor: torch.Tensor = transform(image.convert("RGB"))
    return tensor[None]


def test_predict_prints_what_torch_and_timm_compute(model: nn.Module, bundle: Path) -> None:
    done = predict(bundle, PHOTO)
    assert done.returncode == 0, done.stderr
    name, *lines = done.stdout.splitlines()
    with Image.open(PHOTO) as photo, torch.no_grad():
        probabilities = model(timm_input(photo, INPUT)).softmax(1)[0]
    expected = probabilities.topk(5)
    assert name == str(PHOTO)
    assert [line.split(maxsplit=1)[1] for line in lines] == [LABELS[index] for index in expected.indices]
    # Six decimals are printed: half of the last one, and rounding in float32.
    found = [float(line.split()[0]) for line in lines]
    np.testing.assert_allclose(found, expected.values.numpy(), atol=1.5e-6)


def test_predict_imports_nothing_but_what_it_promises(bundle: Path) -> None:
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "print({'slim', 'torch', 'timm', 'onnx', 'torchvision'} & set(sys.modules))"
    command = [sys.executable, "-I", "-c", code, str(bundle / "predict.py"), str(PHOTO)]
    done = subprocess.run(command, cwd=bundle, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    lines = (bundle / "predict.py").read_text().splitlines()
    assert len(lines) < 50


def test_predict_without_images_says_how_it_is_used(bundle: Path) -> None:
    done = predict(bundle)
    assert done.returncode == 1
    assert "python predict.py IMAGE..." in done.stderr


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("size", "crop"),
    [((224, 224), 0.875), ((64, 64), 1.0), ((33, 33), 0.95), ((96, 64), 0.875), ((64, 97), 0.9), ((40, 200), 1.0)],
)
def test_preprocessing_is_timms_to_float_rounding(
    tmp_path: Path, artifact: Artifact, exported: OnnxFile, size: tuple[int, int], crop: float, interpolation: str
) -> None:
    preprocessing = INPUT.model_copy(update={"size": (3, *size), "crop": crop, "interpolation": interpolation})
    resized = dataclasses.replace(artifact, backbone=BACKBONE.model_copy(update={"input": preprocessing}))
    port = Port("image", "float32", ("batch", 3, *size))
    write_example(tmp_path, resized, {"model.onnx": dataclasses.replace(exported, inputs=(port,))})
    spec = importlib.util.spec_from_file_location("bundled_predict", tmp_path / "predict.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with Image.open(PHOTO) as photo:
        wide, tall = photo.copy(), photo.rotate(90, expand=True)
    odd, tiny = wide.crop((7, 11, 378, 300)), wide.resize((31, 19))
    sources = [
        wide,
        tall,
        odd,
        tiny,
        wide.convert("P"),
        wide.convert("L"),
        wide.convert("RGBA"),
        wide.crop((0, 0, 200, 199)),
    ]
    for image in sources:
        found = module.preprocess(image)
        expected = timm_input(image, preprocessing).numpy()
        assert (found.dtype, found.shape, found.flags["C_CONTIGUOUS"]) == (np.float32, expected.shape, True)
        # The same pixels; (value / 255 - mean) / std in float32 leaves a few units in the last place of at most 5.
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_the_files_say_everything_a_server_needs(bundle: Path, exported: OnnxFile, artifact: Artifact) -> None:
    said = read(bundle)
    assert said["format"] == "slim-bundle/2"
    assert said["source"] == {
        "name": "test_efficientnet",
        "kwargs": {},
        "num_classes": 10,
        "digest": artifact.digest,
        "weights": artifact.weights,
        "history": [{"name": "finetune", "version": 3, "config": {"epochs": 2}}],
    }
    assert said["target"] == str(TARGET)
    assert said["served"]["ort:cpu"] == said["served"]["openvino:cpu"] == "model.onnx"
    plain = {"precision": "fp32", "form": None, "opset": exported.opset, "ir_version": exported.ir_version}
    assert said["models"] == {"model.onnx": plain | {"route": exported.route}}
    assert said["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    source = {"name": "image", "dtype": "float32", "shape": ["batch", 3, 64, 64]}
    output = {"name": "logits", "dtype": "float32", "shape": ["batch", 10]}
    ports = {"model.onnx": {"inputs": [source], "outputs": [output]}}
    assert read(bundle, "io") == {"batch": {"min": 1, "max": 64}, "files": ports}
    assert read(bundle, "labels") == list(LABELS)
    assert read(bundle, "scopes") == {"model.onnx": exported.scopes}
    assert read(bundle, "preprocess")["steps"] == [
        {"op": "convert", "mode": "RGB"},
        {"op": "resize", "short_side": 71, "interpolation": "bicubic"},  # floor(64 / 0.9)
        {"op": "center_crop", "size": [64, 64]},
        {"op": "divide", "by": 255},
        {"op": "normalize", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]},
        {"op": "layout", "order": "NCHW", "dtype": "float32"},
    ]


def test_measurements_are_kept_with_their_samples_under_the_devices_fingerprint(bundle: Path) -> None:
    (path,) = (bundle / "bench").iterdir()
    assert path.name == f"{environment.fingerprint()}.json"
    kept = json.loads(path.read_text())
    assert kept["target"] == str(TARGET)
    figures = {name: Measurement.model_validate(one) for name, one in kept["measurements"].items()}
    assert list(figures["accuracy_top1"].samples) == [1, 1, 1, 0]
    assert figures["accuracy_top1"].details["side"] == {"samples_ms": [1.0, 2.0], "top5": 99.5}
    assert figures["parity_max_abs"].details["top1_agreement"] == 100


def test_golden_outputs_are_torchs_and_the_files(bundle: Path, model: nn.Module, images: Tensor) -> None:
    with np.load(bundle / "golden.npz") as packed:
        golden: dict[str, Any] = dict(packed)
    # `images` are no photographs, so they were rounded to the nearest of 256 values; half a step is what is lost.
    fed = torch.from_numpy(golden["images"])
    inside = (images * torch.tensor(INPUT.std)[:, None, None] + torch.tensor(INPUT.mean)[:, None, None]).clamp(0, 1)
    bytes_ = torch.from_numpy(golden["image_u8"]).permute(0, 3, 1, 2)
    assert (inside * 255 - bytes_).abs().max() <= 0.5 + 1e-4
    with torch.no_grad():
        np.testing.assert_allclose(golden["logits/torch"], model(fed).numpy(), atol=1e-6)
    np.testing.assert_allclose(golden["logits/model.onnx"], golden["logits/torch"], atol=1e-5)
    said = read(bundle, "parity")
    assert (said["inputs"], said["target"]) == ("images", "ort:cpu")
    apart = np.abs(golden["logits/model.onnx"] - golden["logits/torch"])
    found = said["files"]["model.onnx"]
    assert found["max_abs"] == pytest.approx(float(apart.max()))
    assert (found["n"], found["top1_agreement"]) == (4, 100)
    assert found["cosine"] > 0.9999
    assert read(bundle)["golden"] == {"inputs": "images", "count": 4}


def test_hashes_are_true_and_account_for_all_but_measurements(bundle: Path, exported: OnnxFile) -> None:
    said, there = read(bundle)["files"], files(bundle)
    assert {name for name in there if name not in said and not name.startswith("bench/")} == {"manifest.json"}
    assert said["model.onnx"] == {"sha256": exported.sha256, "bytes": exported.size_bytes}
    assert said == {
        name: {"sha256": hashlib.sha256(there[name]).hexdigest(), "bytes": len(there[name])} for name in said
    }


def test_no_place_on_this_machine_is_named(bundle: Path, exported: OnnxFile) -> None:
    for name, data in files(bundle).items():
        for place in (str(bundle.parent), str(exported.path.parent), str(Path.cwd()), sys.prefix, str(Path.home())):
            assert place.encode() not in data, (name, place)


def test_the_card_tells_people_the_same(bundle: Path) -> None:
    text = (bundle / "MODEL_CARD.md").read_text()
    assert "# test_efficientnet" in text
    assert "`image` batch x 3 x 64 x 64 float32 in, `logits` batch x 10 float32 out; batch 1 to 64" in text
    assert "2. resize: short_side 71, interpolation bicubic" in text
    assert f"| accuracy_top1 | 75 percent (mean, n=4, 95% 30.1..95.4) | {TARGET} |" in text
    assert "1. `finetune` (version 3): epochs = 2\n" in text
    assert "python predict.py photo.jpg" in text


def test_unknown_labels_are_null_and_never_invented(
    tmp_path: Path, artifact: Artifact, exported: OnnxFile, model: nn.Module
) -> None:
    folder = write_bundle(tmp_path / "bundle", dataclasses.replace(artifact, labels=None, history=()), exported, {})
    assert read(folder, "labels") is None
    assert "class " in predict(folder, PHOTO).stdout
    text = (folder / "MODEL_CARD.md").read_text()
    assert "no compression pass was applied" in text
    assert "exported without a target or without data" in text


def test_a_bundle_is_replaced_whole_and_nothing_else_is(tmp_path: Path, artifact: Artifact, exported: OnnxFile) -> None:
    folder = write_bundle(tmp_path / "bundle", artifact, exported, {})
    (folder / "left over").write_text("from the older bundle")
    write_bundle(folder, artifact, exported, {})
    assert os.listdir(tmp_path) == ["bundle"]
    assert "left over" not in os.listdir(folder)
    (folder / "manifest.json").unlink()
    (folder / "bundle.json").write_text('{"format": "slim-bundle/1"}')  # as older ones had it
    write_bundle(folder, artifact, exported, {})
    assert "bundle.json" not in os.listdir(folder)


@pytest.mark.parametrize("name", ["only.jpg", "manifest.json", "bundle.json"])
def test_what_is_no_bundle_is_left_alone(tmp_path: Path, artifact: Artifact, exported: OnnxFile, name: str) -> None:
    (tmp_path / name).write_text('{"format": "of a web application"}')
    with pytest.raises(UsageError, match=r"exists and is not a bundle \(no manifest\.json of one\); choose another pl"):
        write_bundle(tmp_path, artifact, exported, {})
    assert os.listdir(tmp_path) == [name]


def test_all_but_measurements_is_the_same_when_the_same_network_is_bundled_again(
    tmp_path: Path, artifact: Artifact, exported: OnnxFile, images: Tensor
) -> None:
    def once(name: str, milliseconds: float) -> dict[str, bytes]:
        latency = Measurement(metric="latency_p50_ms", value=milliseconds, unit="ms", samples=(milliseconds,))
        return files(write_bundle(tmp_path / name, artifact, exported, {"latency_p50_ms": latency}, images=images))

    one, other = once("one", 1.0), once("other", 2.0)
    assert one.keys() == other.keys()
    assert {name.partition("/")[0] for name in one if one[name] != other[name]} == {"bench"}


def test_what_does_not_belong_together_is_not_bundled(tmp_path: Path, artifact: Artifact, exported: OnnxFile) -> None:
    folder = tmp_path / "bundle"
    with pytest.raises(UsageError, match=r"9 labels for 10 outputs of .*exported\.onnx"):
        write_bundle(folder, dataclasses.replace(artifact, labels=LABELS[:9]), exported, {})
    larger = BACKBONE.model_copy(update={"input": INPUT.model_copy(update={"size": (3, 96, 96)})})
    with pytest.raises(UsageError, match=r"takes \(3, 64, 64\), the network's preprocessing gives \(3, 96, 96\)"):
        write_bundle(folder, dataclasses.replace(artifact, backbone=larger), exported, {})
    changed = tmp_path / "changed.onnx"
    changed.write_bytes(exported.path.read_bytes() + b"!")
    with pytest.raises(StoreError, match=r"changed\.onnx: changed since it was exported and measured"):
        write_bundle(folder, artifact, dataclasses.replace(exported, path=changed), {})
    with pytest.raises(StoreError, match=r"none\.onnx: cannot be read: No such file or directory; export it again"):
        write_bundle(folder, artifact, dataclasses.replace(exported, path=tmp_path / "none.onnx"), {})
    assert not folder.exists()


def test_a_file_of_another_network_is_not_bundled(tmp_path: Path, artifact: Artifact) -> None:
    other = export_onnx(BACKBONE.build(seed=4), tmp_path / "other.onnx", INPUT)
    with pytest.raises(ParityError, match=r"parity: bundle's model\.onnx differs from torch by"):
        write_bundle(tmp_path / "bundle", artifact, other, {})
    assert sorted(os.listdir(tmp_path)) == ["other.onnx"]
