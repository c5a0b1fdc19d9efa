from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn

from slim.artifact import Artifact, Backbone, Preprocessing, Step
from slim.errors import StoreError, UsageError
from slim.export.bundle import write_bundle
from slim.export.onnx import OnnxFile, Port, export_onnx
from slim.export.parity import parity
from slim.export.target import Target
from slim.measurement import Measurement

PHOTO = Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"  # 640 x 427, a real photograph
LABELS = tuple(f"kind {number} of temple" for number in range(10))
INPUT = Preprocessing(size=(3, 64, 64), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), crop=0.9)
BACKBONE = Backbone(name="test_efficientnet", num_classes=10, input=INPUT)
TARGET = Target.parse("ort:cpu")
STEP = Step(name="low-rank", version=3, config={"energy": 0.9}, plan={"ranks": {"fc": 8}}, seed=0)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return BACKBONE.build(seed=3)


@pytest.fixture(scope="module")
def exported(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> OnnxFile:
    return export_onnx(model, tmp_path_factory.mktemp("bundle") / "exported.onnx", INPUT)


@pytest.fixture(scope="module")
def artifact(model: nn.Module) -> Artifact:
    return Artifact.of(model, BACKBONE, labels=LABELS, history=(STEP,))


@pytest.fixture(scope="module")
def bundle(model: nn.Module, exported: OnnxFile, artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = torch.rand(4, *INPUT.size, generator=torch.Generator().manual_seed(0))
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
    return write_bundle(tmp_path_factory.mktemp("out") / "bundle", artifact, exported, figures)


def manifest(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "bundle.json").read_text())
    return loaded


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
    folder = write_bundle(tmp_path / "bundle", resized, dataclasses.replace(exported, inputs=(port,)), {})
    spec = importlib.util.spec_from_file_location("bundled_predict", folder / "predict.py")
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


def test_the_manifest_says_everything_a_server_needs(bundle: Path, exported: OnnxFile, artifact: Artifact) -> None:
    said = manifest(bundle)
    assert said["format"] == "slim-bundle/1"
    assert said["model"] == {"name": "test_efficientnet", "num_classes": 10, "digest": artifact.digest}
    assert said["input"] == {"name": "image", "dtype": "float32", "shape": ["batch", 3, 64, 64]}
    assert said["output"] == {"name": "logits", "dtype": "float32", "shape": ["batch", 10]}
    assert said["batch"] == {"min": 1, "max": 64}
    assert (said["opset"], said["ir_version"]) == (exported.opset, exported.ir_version)
    assert said["labels"] == list(LABELS)
    assert said["history"] == [{"name": "low-rank", "version": 3, "config": {"energy": 0.9}}]
    assert said["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert said["preprocessing"]["steps"] == [
        {"op": "convert", "mode": "RGB"},
        {"op": "resize", "short_side": 71, "interpolation": "bicubic"},  # floor(64 / 0.9)
        {"op": "center_crop", "size": [64, 64]},
        {"op": "divide", "by": 255},
        {"op": "normalize", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]},
        {"op": "layout", "order": "NCHW", "dtype": "float32"},
    ]


def test_figures_are_kept_and_raw_samples_are_not(bundle: Path) -> None:
    figures = manifest(bundle)["measurements"]
    assert figures["accuracy_top1"]["value"] == 75
    assert figures["accuracy_top1"]["target"] == str(TARGET)
    assert figures["accuracy_top1"]["details"] == {"side": {"top5": 99.5}}
    assert figures["parity_max_abs"]["details"]["top1_agreement"] == 100
    assert not {"samples", "predictions"} & set(figures["accuracy_top1"])


def test_hashes_are_true_and_paths_stay_inside(bundle: Path, exported: OnnxFile) -> None:
    files = manifest(bundle)["files"]
    assert sorted([*files, "bundle.json"]) == sorted(os.listdir(bundle))
    assert files["model.onnx"] == {"sha256": exported.sha256, "bytes": exported.size_bytes}
    for name, said in files.items():
        assert not PurePosixPath(name).is_absolute()
        assert (bundle / name).resolve().parent == bundle.resolve()
        data = (bundle / name).read_bytes()
        assert said == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def test_no_place_on_this_machine_is_named(bundle: Path, exported: OnnxFile) -> None:
    for name in os.listdir(bundle):
        data = (bundle / name).read_bytes()
        for place in (str(bundle.parent), str(exported.path.parent), str(Path.cwd()), sys.prefix, str(Path.home())):
            assert place.encode() not in data, (name, place)


def test_the_readme_tells_people_the_same(bundle: Path) -> None:
    text = (bundle / "README.md").read_text()
    assert "# test_efficientnet" in text
    assert "`image` batch x 3 x 64 x 64 float32 in, `logits` batch x 10 float32 out; batch 1 to 64" in text
    assert "2. resize: short_side 71, interpolation bicubic" in text
    assert f"| accuracy_top1 | 75 percent (mean, n=4, 95% 30.1..95.4) | {TARGET} |" in text
    assert "1. `low-rank` (version 3): energy = 0.9\n" in text
    assert "python predict.py photo.jpg" in text


def test_unknown_labels_are_null_and_never_invented(
    tmp_path: Path, artifact: Artifact, exported: OnnxFile, model: nn.Module
) -> None:
    folder = write_bundle(tmp_path / "bundle", dataclasses.replace(artifact, labels=None, history=()), exported, {})
    assert manifest(folder)["labels"] is None
    assert "class " in predict(folder, PHOTO).stdout
    text = (folder / "README.md").read_text()
    assert "no compression pass was applied" in text
    assert "exported without a target or without data" in text


def test_a_bundle_is_replaced_whole_and_nothing_else_is(tmp_path: Path, artifact: Artifact, exported: OnnxFile) -> None:
    folder = write_bundle(tmp_path / "bundle", artifact, exported, {})
    (folder / "left over").write_text("from the older bundle")
    write_bundle(folder, artifact, exported, {})
    assert os.listdir(tmp_path) == ["bundle"]
    assert "left over" not in os.listdir(folder)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "only.jpg").write_text("precious")
    with pytest.raises(
        UsageError, match=r"photos: exists and is not a bundle \(no bundle\.json\); choose another place"
    ):
        write_bundle(photos, artifact, exported, {})
    assert os.listdir(photos) == ["only.jpg"]


def test_the_same_network_gives_the_same_bundle(tmp_path: Path, artifact: Artifact, exported: OnnxFile) -> None:
    one, other = (write_bundle(tmp_path / name, artifact, exported, {}) for name in ("one", "other"))
    assert {path.name: path.read_bytes() for path in one.iterdir()} == {
        path.name: path.read_bytes() for path in other.iterdir()
    }


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
