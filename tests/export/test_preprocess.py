from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import sklearn.datasets
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from slim.artifact import Backbone, Preprocessing
from slim.errors import StoreError, UsageError
from slim.export.golden import noise
from slim.export.half import export_half
from slim.export.lint import ONNXRUNTIME, OPENVINO, TENSORRT, lint_file
from slim.export.onnx import OnnxFile, Port, export_onnx, read_ports
from slim.export.parity import GATES, cosine
from slim.export.preprocess import normalised, pixels_of, with_preprocessing
from slim.export.quantized import structure, write
from slim.export.ranges import ranges
from slim.export.target import Target
from slim.quantization import Quantization

PHOTOS = Path(sklearn.datasets.__file__).parent / "images"  # china.jpg and flower.jpg, real photographs
INPUT = Preprocessing(size=(3, 64, 96), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
FORMS: tuple[Literal["s8", "u8"], ...] = ("s8", "u8")


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """(8, 64, 96, 3) uint8: parts of two photographs."""
    parts = []
    for name in ("china.jpg", "flower.jpg"):
        with Image.open(PHOTOS / name) as photo:
            parts += [np.asarray(photo.crop((x, 100, x + 96, 164))) for x in (0, 150, 300, 450)]
    return torch.from_numpy(np.stack(parts))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> OnnxFile:
    model = Backbone(name="test_efficientnet", num_classes=10, input=INPUT).build(seed=3)
    return export_onnx(model, tmp_path_factory.mktemp("preprocess") / "model.onnx", INPUT)


def outputs(path: Path, fed: Tensor) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {session.get_inputs()[0].name: fed.numpy()})[0]
    return found


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


def test_bytes_in_give_the_logits_of_the_normal_road(tmp_path: Path, file: OnnxFile, pixels: Tensor) -> None:
    found = with_preprocessing(file, INPUT, tmp_path / "u8.onnx")
    # One rounding to float32 more or less at the input: 1e-7, and some layers.
    assert apart(outputs(found.path, pixels), outputs(file.path, normalised(pixels, INPUT))) < 1e-5
    assert apart(outputs(found.path, pixels.flip(1)), outputs(file.path, normalised(pixels, INPUT))) > 1e-3


def test_the_input_is_bytes_of_the_networks_size_and_the_output_is_as_it_was(tmp_path: Path, file: OnnxFile) -> None:
    found = with_preprocessing(file, INPUT, tmp_path / "u8.onnx")
    assert found.inputs == (Port("image_u8", "uint8", ("batch", 64, 96, 3)),)
    assert read_ports(found.path) == (found.inputs, file.outputs)
    assert found.nodes == file.nodes + 4
    graph = onnx.load(found.path).graph
    assert [node.op_type for node in graph.node[:4]] == ["Cast", "Mul", "Add", "Transpose"]
    assert found.scopes.keys() == {node.name for node in graph.node}
    assert {name: found.scopes[name] for name in file.scopes} == file.scopes


def test_the_same_file_gives_the_same_bytes(tmp_path: Path, file: OnnxFile) -> None:
    one, other = (with_preprocessing(file, INPUT, tmp_path / name) for name in ("one.onnx", "other.onnx"))
    assert one.path.read_bytes() == other.path.read_bytes()
    assert one.sha256 == other.sha256


def test_no_runtime_objects_to_the_steps_in_front(tmp_path: Path, file: OnnxFile) -> None:
    found = with_preprocessing(file, INPUT, tmp_path / "u8.onnx")
    for rules in (TENSORRT, OPENVINO, ONNXRUNTIME):
        assert lint_file(found.path, rules) == lint_file(file.path, rules)


@pytest.mark.parametrize("form", FORMS)
def test_int8_files_take_bytes_as_well(
    tmp_path: Path, file: OnnxFile, pixels: Tensor, form: Literal["s8", "u8"]
) -> None:
    images = normalised(pixels, INPUT)
    known = ranges(file, [images], "minmax", Target.parse("ort:cpu"), 1)
    setting = Quantization(graph=structure(file), method="minmax", ranges=known)
    plain = write(file, setting, form, tmp_path / "plain.onnx")
    found = with_preprocessing(plain, INPUT, tmp_path / "u8.onnx")
    assert read_ports(found.path)[0] == found.inputs
    ours, theirs = outputs(found.path, pixels), outputs(plain.path, images)
    # A value half-way between two of 256 levels may fall on the other one, and takes others with it.
    assert apart(ours, theirs) < 0.1
    assert cosine(*map(torch.from_numpy, (theirs, ours))) > GATES["int8"].cosine


def test_half_precision_takes_bytes_as_well(tmp_path: Path, file: OnnxFile, pixels: Tensor) -> None:
    model = Backbone(name="test_efficientnet", num_classes=10, input=INPUT).build(seed=3)
    half = export_half(model, (), tmp_path / "half.onnx", INPUT)
    found = with_preprocessing(half, INPUT, tmp_path / "u8.onnx")
    # Numbers of 11 bits: 5e-4 for each rounding.
    assert apart(outputs(found.path, pixels), outputs(half.path, normalised(pixels, INPUT))) < 5e-3


def test_pixels_and_images_are_each_others(pixels: Tensor) -> None:
    assert torch.equal(pixels_of(normalised(pixels, INPUT), INPUT), pixels)
    drawn = noise(INPUT)
    assert (drawn.shape, drawn.dtype) == ((8, 64, 96, 3), torch.uint8)
    assert drawn.min() == 0
    assert drawn.max() == 255
    assert torch.equal(drawn, noise(INPUT))


def test_a_file_fed_otherwise_is_refused(tmp_path: Path, file: OnnxFile) -> None:
    taller = INPUT.model_copy(update={"size": (3, 96, 64)})
    with pytest.raises(UsageError, match=r"takes float32 \(3, 64, 96\), the preprocessing gives float32 \(3, 96, 64\)"):
        with_preprocessing(file, taller, tmp_path / "u8.onnx")
    once = with_preprocessing(file, INPUT, tmp_path / "u8.onnx")
    with pytest.raises(UsageError, match=r"u8\.onnx: takes uint8 \(64, 96, 3\)"):
        with_preprocessing(once, INPUT, tmp_path / "twice.onnx")
    once.path.write_bytes(file.path.read_bytes()[:1000])
    with pytest.raises(StoreError, match=r"u8\.onnx: not a whole ONNX file"):
        with_preprocessing(replace(file, path=once.path), INPUT, tmp_path / "cut.onnx")


def test_the_real_mobilenet_sees_the_same_real_images_as_bytes(data_dir: Path, tmp_path: Path) -> None:
    fed = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    model = timm.create_model("mobilenetv2_100", pad_type="same").eval()
    model.load_state_dict(load_file(data_dir / "mobilenetv2_100.safetensors"))
    file = export_onnx(model, tmp_path / "model.onnx", fed)
    read = []
    with tarfile.open(data_dir / "imagenet-sample.tar") as archive:
        for member in sorted((m for m in archive if m.isfile()), key=lambda m: m.name)[:512:32]:
            with Image.open(archive.extractfile(member)) as image:  # type: ignore[arg-type]
                read.append(np.asarray(image.convert("RGB").resize((224, 224))))
    pixels = torch.from_numpy(np.stack(read))
    images = normalised(pixels, fed)
    found = with_preprocessing(file, fed, tmp_path / "u8.onnx")
    relative = apart(outputs(found.path, pixels), outputs(file.path, images))
    setting = Quantization(
        graph=structure(file), method="minmax", ranges=ranges(file, [images], "minmax", Target.parse("ort:cpu"), 1)
    )
    print(f"fp32: {relative:.2g} of the largest logit")
    assert relative < 1e-5
    for form in FORMS:
        int8 = write(file, setting, form, tmp_path / f"{form}.onnx")
        bytes_in = with_preprocessing(int8, fed, tmp_path / f"{form}.u8.onnx")
        ours, theirs = outputs(bytes_in.path, pixels), outputs(int8.path, images)
        same = (ours.argmax(1) == theirs.argmax(1)).mean()
        print(f"{form}: {apart(ours, theirs):.2g} of the largest logit, {100 * same:.0f} % keep their class")
        # With mean and deviation 0.5 and all bytes in the range, every byte lies half-way between two levels of u8, and
        # the last bit decides: 55 of 256 fall on the other one. That is noise of one level, which may cost one image.
        assert cosine(*map(torch.from_numpy, (theirs, ours))) > GATES["int8"].cosine
        assert same >= 1 - 1 / len(pixels)
