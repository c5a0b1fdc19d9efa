"""Builds by TensorRT-RTX, for real: it reads and lowers what TensorRT would, on a machine without a GPU.

Nothing is executed: these tests show that a plan comes out, not what it computes.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper
from pydantic import ValidationError
from timm.layers import SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.regnet import RegNet, RegNetCfg
from torch import nn

from slim import surgery
from slim.artifact import Preprocessing
from slim.errors import MissingExtra, SlimError, TargetError, UsageError
from slim.export.half import export_half
from slim.export.onnx import OnnxFile, export_onnx
from slim.export.quantized import write
from slim.export.ranges import ranges, structure
from slim.export.target import Target
from slim.export.tensorrt import APIS, BuildOptions, Session, build, version
from slim.quantization import Quantization

RTX = "tensorrt_rtx"
pytestmark = pytest.mark.usefixtures("one_thread")
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec(RTX) is None, reason="tensorrt_rtx is not installed: pip install 'slim[rtx]'"
)

SIZE = Preprocessing(size=(3, 64, 64))
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    # Each family with as few blocks as it can have; whole ones are in tests/zoo/test_tensorrt_zoo.py.
    "resnet": lambda: timm.create_model("resnet18", num_classes=10, layers=(1, 1, 1, 1)),
    "mobilenetv3": lambda: MobileNetV3(
        decode_arch_def([["ds_r1_k3_s2_e1_c16_se0.25_nre"], ["ir_r2_k5_s2_e4_c24_se0.25"], ["cn_r1_k1_s1_c96"]]),
        num_classes=10,
        act_layer=nn.Hardswish,
        se_layer=partial(SqueezeExcite, gate_layer="hard_sigmoid"),
    ),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=64, depth=2),
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=10, depths=(1, 1, 1, 1)),
    "efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=10),
    "regnety": lambda: RegNet(RegNetCfg(depth=4, w0=24, wa=40.0, wm=2.0, group_size=8, se_ratio=0.25), num_classes=10),
}
RANGE = BuildOptions(batch=(1, 2, 4))


@cache
def network(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return surgery.audible(NETWORKS[name]()).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], OnnxFile]:
    folder = tmp_path_factory.mktemp("onnx")
    return cache(lambda name: export_onnx(network(name), folder / f"{name}.onnx", SIZE))


@pytest.fixture
def resnet(exported: Callable[[str], OnnxFile]) -> Path:
    return exported("resnet").path


def in_int8(file: OnnxFile, path: Path) -> OnnxFile:
    """In the form that TensorRT takes, with ranges of a few random images."""
    images = torch.randn(4, *SIZE.size, generator=torch.Generator().manual_seed(0))
    seen = ranges(file, [images], "minmax", Target.parse("ort:cpu"), 1)
    return write(file, Quantization(graph=structure(file), method="minmax", ranges=seen), "s8", path)


def saved(path: Path, *nodes: onnx.NodeProto, inputs: dict[str, list[Any]], output: str) -> Path:
    """A graph of these nodes with float32 inputs of these shapes."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    result = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "graph", ports, [result])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_becomes_a_plan_and_for_one_batch_the_same_one_again(
    name: str, precision: str, exported: Callable[[str], OnnxFile], tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    if precision == "fp16":
        export_half(network(name), (), path, SIZE)
    elif precision == "int8":
        in_int8(exported(name), path)
    else:
        path = exported(name).path
    engine = build(RTX, path, RANGE)
    assert (engine.api, engine.version, engine.options) == (RTX, version(RTX), RANGE)
    # The header: four letters, and at 24 a byte each for major, minor, patch and build.
    assert engine.plan[:4] == b"vtrt"
    assert tuple(engine.plan[24:28]) == tuple(int(part) for part in version(RTX).split("."))
    # The weights are in it, in the precision of the graph.
    values = sum(value.numel() for value in network(name).parameters())
    assert len(engine.plan) > {"fp32": 4, "fp16": 2, "int8": 1}[precision] * values
    assert build(RTX, path).plan == build(RTX, path).plan


@needs_rtx
def test_without_a_gpu_there_is_nothing_to_inspect_and_no_session(resnet: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    engine = build(RTX, resnet, RANGE)
    assert (engine.layers, engine.timing_cache) == (None, None)
    with pytest.raises(TargetError, match=r"tensorrt_rtx [\d.]+: torch finds no GPU on this machine; open the plan wh"):
        Session(RTX, engine.plan)


@needs_rtx
@pytest.mark.parametrize("asked", [{"batch": (2, 2, 2)}, {"workspace_mib": 64}, {"compute_capability": (8, 6)}])
def test_what_is_asked_for_changes_the_plan(resnet: Path, asked: dict[str, Any]) -> None:
    # Not the optimisation level: TensorRT-RTX takes any and builds the same.
    assert build(RTX, resnet, BuildOptions(**asked)).plan != build(RTX, resnet).plan


@needs_rtx
def test_progress_is_told_and_does_not_change_the_plan(resnet: Path) -> None:
    told: list[tuple[str, int, int]] = []
    plan = build(RTX, resnet, progress=lambda *step: told.append(step)).plan
    assert told[0][1] == 0
    assert told[-1][0] == told[0][0]  # the outermost phase
    assert told[-1][1] == told[-1][2]
    assert plan == build(RTX, resnet).plan


@needs_rtx
def test_what_progress_raises_ends_the_build(resnet: Path) -> None:
    told = []

    def stop(phase: str, done: int, steps: int) -> None:
        told.append(phase)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(RTX, resnet, RANGE, progress=stop)
    assert len(told) == 3


@needs_rtx
def test_an_operator_it_does_not_have_is_named_with_its_node_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fold = helper.make_node("Col2Im", ["x", "image", "block"], ["y"], name="head.fold")
    sizes = [
        helper.make_node("Constant", [], [name], value=helper.make_tensor(name, TensorProto.INT64, [2], value))
        for name, value in (("image", [4, 4]), ("block", [2, 2]))
    ]
    path = saved(tmp_path / "fold.onnx", *sizes, fold, inputs={"x": ["batch", 12, 9]}, output="y")
    with pytest.raises(
        SlimError, match=r"fold\.onnx: tensorrt_rtx [\d.]+ cannot read it: node 'head\.fold' \(Col2Im\): "
    ) as caught:
        build(RTX, path)
    assert str(caught.value).endswith("; keep that operation out of the network, or serve it with another runtime")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # the library would have printed it as well


@needs_rtx
def test_what_the_builder_refuses_is_told_in_one_line(resnet: Path) -> None:
    with pytest.raises(SlimError, match=r"tensorrt_rtx [\d.]+ cannot build it: .*FP32 .* is not supported") as caught:
        build(RTX, resnet, BuildOptions(compute_capability=(7, 5)))  # Turing, which it serves in fp16 only
    assert "\n" not in str(caught.value)


@needs_rtx
def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "torn.onnx"
    path.write_bytes(b"no graph at all")
    with pytest.raises(SlimError, match=r"torn\.onnx: tensorrt_rtx [\d.]+ cannot read it: \w"):
        build(RTX, path)
    with pytest.raises(UsageError, match=r"none\.onnx: no such file; give an exported \.onnx file"):
        build(RTX, tmp_path / "none.onnx")


@needs_rtx
def test_only_the_batch_may_be_free_and_a_fixed_one_must_be_the_one_asked_for(tmp_path: Path) -> None:
    relu = helper.make_node("Relu", ["x"], ["y"])
    wide = saved(tmp_path / "wide.onnx", relu, inputs={"x": ["batch", 3, "width"]}, output="y")
    with pytest.raises(UsageError, match=r"input 'x' is \(-1, 3, -1\); only the batch may be free, fix the rest"):
        build(RTX, wide)
    fixed = saved(tmp_path / "fixed.onnx", relu, inputs={"x": [4, 3, 8]}, output="y")
    assert build(RTX, fixed, BuildOptions(batch=(4, 4, 4))).plan
    with pytest.raises(UsageError, match=r"input 'x' is \(4, 3, 8\), the batches \(1, 1, 1\); give the fixed one thri"):
        build(RTX, fixed)


@needs_rtx
def test_every_free_input_gets_the_batches(tmp_path: Path) -> None:
    add = helper.make_node("Add", ["x", "z"], ["y"])
    path = saved(tmp_path / "add.onnx", add, inputs={"x": ["batch", 3], "z": ["batch", 3]}, output="y")
    assert build(RTX, path, RANGE).plan  # a free input that is not in the profile is an error of the builder


@needs_rtx
def test_options_of_tensorrt_and_unknown_gpus_are_refused(resnet: Path) -> None:
    with pytest.raises(UsageError, match="a timing cache is TensorRT's; TensorRT-RTX measures nothing, leave it out"):
        build(RTX, resnet, timing_cache=b"cache")
    with pytest.raises(UsageError, match=r"compute capability \(9, 0\): SM90 is none of .*SM86, SM89"):
        build(RTX, resnet, BuildOptions(compute_capability=(9, 0)))


def test_a_module_that_is_missing_or_broken_comes_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for api, (_, remedy) in APIS.items():
        monkeypatch.setitem(sys.modules, api, None)  # importing it raises ModuleNotFoundError
        with pytest.raises(MissingExtra) as caught:
            version(api)
        assert str(caught.value).startswith(f"{api} cannot be imported: ")
        assert str(caught.value).endswith(f"; {remedy}")
    monkeypatch.delitem(sys.modules, "tensorrt")
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtra, match=r"tensorrt cannot be imported: libnvinfer\.so\.10: cannot open .*JetPack"):
        version("tensorrt")


@pytest.mark.parametrize(("found", "old"), [("8.6.1", True), ("10.2.0", True), ("10.3.0", False), ("11.4.0", False)])
def test_a_version_before_10_3_is_too_old(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: str, old: bool
) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    (tmp_path / "tensorrt.py").write_text(f"__version__ = {found!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    if old:
        with pytest.raises(TargetError, match=rf"tensorrt {found} is too old; slim needs 10\.3 or newer"):
            version("tensorrt")
    else:
        assert version("tensorrt") == found
    sys.modules.pop("tensorrt")


def test_another_api_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown API 'tensorrt-rtx'; did you mean 'tensorrt_rtx'\?"):
        version("tensorrt-rtx")


@pytest.mark.parametrize(
    "wrong",
    [{"batch": (2, 1, 4)}, {"batch": (0, 1, 1)}, {"workspace_mib": 0}, {"optimization_level": 6}, {"fp16": True}],
)
def test_options_outside_their_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        BuildOptions(**wrong)
