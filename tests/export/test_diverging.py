from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from timm.models.byobnet import MobileOneBlock
from torch import Tensor, nn

from slim.artifact import Preprocessing, state_digest
from slim.export import diverging
from slim.export.diverging import Divergence, first_apart, first_apart_files
from slim.export.onnx import OnnxFile, export_onnx
from slim.export.target import Target

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-4
"""Two orders of summation in float32 differ by less than 1e-5 in nets this small, what is broken by 1e-3 and up."""

SIDE = 32
ORT = Target.parse("ort:cpu")

NETWORKS: dict[str, dict[str, Any]] = {
    "resnet10t": {},
    "mobilenetv3_small_050": {},
    "vit_tiny_patch16_224": {"img_size": SIDE, "patch_size": 8, "depth": 1, "embed_dim": 64, "num_heads": 2},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
}

PLACES = (
    ("resnet10t", "conv1.0", "Conv", 1),  # the very first; its batch norm is folded into it
    ("resnet10t", "layer2.0.downsample.1", "Conv", 2),  # the bias that came from the batch norm
    ("resnet10t", "fc", "Gemm", 2),
    ("mobilenetv3_small_050", "blocks.2.1.conv_dw", "Conv", 1),
    ("mobilenetv3_small_050", "blocks.0.0.se.conv_expand", "Conv", 1),
    ("vit_tiny_patch16_224", "blocks.0.norm1", "LayerNormalization", 1),
    ("vit_tiny_patch16_224", "blocks.0.attn.qkv", "MatMul", 1),
    ("vit_tiny_patch16_224", "blocks.0.attn", "Mul", 1),  # the scale of attention, which belongs to no layer
    ("vit_tiny_patch16_224", "head", "Gemm", 2),
    ("convnext_atto", "stages.1.blocks.0.conv_dw", "Conv", 1),
    ("convnext_atto", "stages.2.blocks.0.mlp.fc2", "Conv", 1),
    ("convnext_atto", "stages.3.blocks.0", "Mul", 1),  # the layer scale
)
"""Network, module, operator, and which of its inputs is broken."""


@dataclass(frozen=True)
class Both:
    model: nn.Module
    file: OnnxFile


def images(count: int = 2, side: int = SIDE) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def heard(make: Callable[[], nn.Module]) -> nn.Module:
    """A fresh network whose biases, norms and layer scales are not all zero or one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if value.ndim == 1:
                    value.add_(0.1 * torch.rand_like(value) if "running_var" in name else 0.1 * torch.randn_like(value))
    return model


def exported(make: Callable[[], nn.Module], folder: Path, side: int = SIDE) -> Both:
    model = heard(make)
    return Both(model, export_onnx(model, folder / "model.onnx", Preprocessing(size=(3, side, side))))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Both]:
    """A timm network and its file; each is exported once."""
    known: dict[str, Both] = {}

    def saved_(name: str) -> Both:
        if name not in known:
            known[name] = exported(lambda: timm.create_model(name, **NETWORKS[name]), tmp_path_factory.mktemp(name))
        return known[name]

    return saved_


def broken(file: OnnxFile, module: str, op: str, position: int, path: Path) -> tuple[OnnxFile, str]:
    """A copy of `file` with another constant in the first node of that operator and module; and that node's name."""
    proto = onnx.load(file.path)
    values = {value.name: value for value in proto.graph.initializer}
    node = next(node for node in proto.graph.node if node.op_type == op and file.scopes[node.name] == module)
    value = onnx.numpy_helper.to_array(values[node.input[position]])
    # Added under a name of its own: equal constants of several nodes are one in the file.
    node.input[position] = f"broken in {node.name}"
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value * 1.5), node.input[position]))
    onnx.save(proto, path)
    return replace(file, path=path), node.name


def ops(file: OnnxFile) -> dict[str, str]:
    return {node.name: node.op_type for node in onnx.load(file.path).graph.node}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_exported_rightly_is_nowhere_apart(saved: Callable[[str], Both], name: str) -> None:
    both = saved(name)
    assert first_apart(both.model, both.file, images(), tolerance=TOLERANCE) is None


@pytest.mark.parametrize(("name", "module", "op", "position"), PLACES)
def test_one_broken_constant_names_its_module(
    saved: Callable[[str], Both], tmp_path: Path, name: str, module: str, op: str, position: int
) -> None:
    both = saved(name)
    file, node = broken(both.file, module, op, position, tmp_path / "broken.onnx")
    found = first_apart(both.model, file, images(), tolerance=TOLERANCE)
    assert found is not None
    assert found.module == both.file.scopes[found.node] == module
    assert found.op == ops(file)[found.node]
    assert found.relative > TOLERANCE
    if op not in ("MatMul", "Mul"):  # followed by another node before the module gives its output
        assert found.node == node


@pytest.mark.parametrize("target", ["ort:cpu", "openvino:cpu"])
@pytest.mark.parametrize(("name", "module", "op", "position"), [PLACES[i] for i in (0, 3, 6, 8, 10)])
def test_one_broken_constant_of_another_file_names_its_node(
    saved: Callable[[str], Both], tmp_path: Path, name: str, module: str, op: str, position: int, target: str
) -> None:
    if target.startswith("openvino"):
        pytest.importorskip("openvino")
    reference, on = saved(name).file, Target.parse(target)
    candidate, node = broken(reference, module, op, position, tmp_path / "broken.onnx")
    found = first_apart_files(reference, candidate.path, images(), target=on, tolerance=TOLERANCE)
    assert found is not None
    assert (found.node, found.op, found.module) == (node, op, module)
    assert first_apart_files(reference, reference, images(), target=on, tolerance=TOLERANCE) is None


class Sly(nn.Module):
    """Computes something else while it is exported."""

    def forward(self, values: Tensor) -> Tensor:
        return values.relu() * 0.9 if torch.compiler.is_exporting() else values.relu()


class Small(nn.Module):
    """Convolution and batch norm, a part of the test's choice, and a linear layer that is called twice."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.part = part
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        features = self.part(self.norm(self.conv(image))).mean((2, 3))
        return self.head(self.twice(self.twice(features).relu()))  # type: ignore[no-any-return]


class Looking(Small):
    """Looks at its images, which torch.export cannot do."""

    def forward(self, image: Tensor) -> Tensor:
        if torch.isnan(image).any():
            raise ValueError("not an image")
        return super().forward(image)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Both:
    return exported(lambda: Small(nn.ReLU()), tmp_path_factory.mktemp("small"), 8)


def test_a_module_that_computes_something_else_while_it_is_exported_is_named(tmp_path: Path) -> None:
    both = exported(lambda: Small(Sly()), tmp_path, 8)
    found = first_apart(both.model, both.file, images(side=8), tolerance=TOLERANCE)
    assert found is not None
    assert (found.module, found.op) == ("part", "Mul")
    assert found.relative == pytest.approx(0.1, rel=1e-5)


def test_a_module_called_twice_is_not_compared_but_what_follows_it_is(small: Both, tmp_path: Path) -> None:
    assert [small.file.scopes[node] for node in ops(small.file)].count("twice") > 1
    assert first_apart(small.model, small.file, images(side=8), tolerance=TOLERANCE) is None
    file, _ = broken(small.file, "twice", "Gemm", 1, tmp_path / "broken.onnx")
    found = first_apart(small.model, file, images(side=8), tolerance=TOLERANCE)
    assert found is not None
    assert found.module == "twice"  # as what enters `head`


def test_the_route_of_torchscript_names_modules_as_well(tmp_path: Path) -> None:
    both = exported(lambda: Looking(nn.ReLU()), tmp_path, 8)
    assert both.file.route == "torchscript"
    assert first_apart(both.model, both.file, images(side=8), tolerance=TOLERANCE) is None
    for module, op in (("conv", "Conv"), ("head", "Gemm")):
        file, node = broken(both.file, module, op, 1, tmp_path / f"{op}.onnx")
        found = first_apart(both.model, file, images(side=8), tolerance=TOLERANCE)
        assert found is not None
        assert (found.node, found.module) == (node, module)


def test_modules_that_were_merged_before_are_compared_with_what_they_became(tmp_path: Path) -> None:
    both = exported(lambda: Small(MobileOneBlock(8, 8)), tmp_path, 8)
    assert both.file.branches == "merged"
    assert first_apart(both.model, both.file, images(side=8), tolerance=TOLERANCE) is None
    file, node = broken(both.file, "part.reparam_conv", "Conv", 1, tmp_path / "broken.onnx")
    found = first_apart(both.model, file, images(side=8), tolerance=TOLERANCE)
    assert found is not None
    assert (found.node, found.module) == (node, "part.reparam_conv")
    assert "part.reparam_conv" not in dict(both.model.named_modules())


def test_a_difference_that_is_lost_at_once_is_not_where_the_logits_part(tmp_path: Path) -> None:
    def deaf() -> nn.Module:
        """Convolution, norm and a ReLU that lets nothing of it through."""
        model = Small(nn.Sequential(nn.ReLU()))
        nn.init.constant_(model.norm.bias, -100.0)
        return model

    both = exported(deaf, tmp_path, 8)
    file, _ = broken(both.file, "conv", "Conv", 1, tmp_path / "broken.onnx")
    lost = first_apart(both.model, file, images(side=8), tolerance=TOLERANCE)
    assert lost is not None
    assert lost.module == "conv"  # for want of anything else
    file, node = broken(file, "head", "Gemm", 2, tmp_path / "both.onnx")
    found = first_apart(both.model, file, images(side=8), tolerance=TOLERANCE)
    assert found is not None
    assert found.node == node


def test_the_figures_are_those_of_the_largest_difference(small: Both, tmp_path: Path) -> None:
    proto = onnx.load(small.file.path)
    bias = next(value for value in proto.graph.initializer if value.name == "head.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(0.25), bias.name))
    onnx.save(proto, tmp_path / "broken.onnx")
    file = replace(small.file, path=tmp_path / "broken.onnx")
    found = first_apart(small.model, file, images(side=8), tolerance=TOLERANCE)
    assert found is not None
    with torch.no_grad():
        largest = small.model(images(side=8)).abs().max().item()
    assert found.largest == pytest.approx(0.25, abs=1e-6)  # 0.25 was added to every logit
    assert found.relative == pytest.approx(0.25 / largest, rel=1e-4)


def test_a_value_that_is_not_finite_is_infinitely_far(small: Both, tmp_path: Path) -> None:
    proto = onnx.load(small.file.path)
    bias = next(value for value in proto.graph.initializer if value.name == "head.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(5, np.nan, np.float32), bias.name))
    onnx.save(proto, tmp_path / "broken.onnx")
    found = first_apart_files(small.file, tmp_path / "broken.onnx", images(side=8), target=ORT, tolerance=TOLERANCE)
    assert found is not None
    assert (found.module, found.relative, found.largest) == ("head", float("inf"), float("inf"))
    masked = images(side=8)
    masked[0, 0, 0, 0] = float("nan")  # no number on both sides
    assert first_apart_files(small.file, small.file, masked, target=ORT, tolerance=TOLERANCE) is None


def test_it_reads_as_one_clause() -> None:
    found = Divergence("node_conv2d_7", "Conv", "layer1.0.conv2", 0.3061, 1.5)
    assert str(found) == "first apart at node_conv2d_7 (Conv of layer1.0.conv2): 0.31 of the largest value"
    assert str(replace(found, op="Add", module="")) == "first apart at node_conv2d_7 (Add): 0.31 of the largest value"


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_many_groups_of_tensors_give_what_one_gives(
    saved: Callable[[str], Both], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    both = saved(name)
    *place, _ = next(place for place in PLACES if place[0] == name)
    _, module, op = place
    file, _ = broken(both.file, module, op, 1, tmp_path / "broken.onnx")

    def found() -> tuple[Divergence | None, Divergence | None]:
        return (
            first_apart(both.model, file, images(), tolerance=TOLERANCE),
            first_apart_files(both.file, file, images(), target=ORT, tolerance=TOLERANCE),
        )

    whole = found()
    monkeypatch.setattr(diverging, "HELD_BYTES", 300_000)  # a few tensors of the first layers
    assert found() == whole
    assert None not in whole


def test_only_the_first_few_images_are_looked_at(small: Both) -> None:
    seen: list[int] = []
    hook = small.model.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    try:
        assert first_apart(small.model, small.file, images(9, side=8), tolerance=TOLERANCE) is None
    finally:
        hook.remove()
    assert set(seen) == {diverging.IMAGES}


def test_the_network_is_left_as_it_was(small: Both) -> None:
    model = small.model
    model.train()
    model.get_submodule("norm").eval()  # a frozen batch norm in a network that is being trained
    before = state_digest(model.state_dict()), [module.training for module in model.modules()]
    try:
        assert first_apart(model, small.file, images(side=8), tolerance=TOLERANCE) is None
        assert (state_digest(model.state_dict()), [module.training for module in model.modules()]) == before
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        assert torch.is_grad_enabled()
    finally:
        model.eval()


@pytest.fixture(scope="module")
def int8(saved: Callable[[str], Both], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ResNet in 8 bits; where a ReLU follows, ONNX Runtime's quantiser leaves it out."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Once(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = [{"image": images().numpy()}]

        def get_next(self) -> dict[str, Any] | None:
            return self.left.pop() if self.left else None

    path = tmp_path_factory.mktemp("int8") / "int8.onnx"
    quantize_static(saved("resnet10t").file.path, path, Once(), quant_format=QuantFormat.QDQ, per_channel=True)
    return path


@pytest.mark.parametrize("target", ["ort:cpu", "openvino:cpu"])
def test_eight_bits_are_apart_by_their_rounding_only(
    saved: Callable[[str], Both], int8: Path, tmp_path: Path, target: str
) -> None:
    if target.startswith("openvino"):
        pytest.importorskip("openvino")
    reference, on = saved("resnet10t").file, Target.parse(target)
    left_out = set(ops(reference).values()) - {node.op_type for node in onnx.load(int8).graph.node}
    assert left_out == {"Relu"}
    # A step of 8 bits is 1/255 of the range; a dozen layers add up to a few of them: 0.02 was found.
    assert first_apart_files(reference, int8, images(), target=on, tolerance=0.1) is None
    found = first_apart_files(reference, int8, images(), target=on, tolerance=1e-4)
    assert found is not None
    assert found.relative < 0.1


def test_a_broken_weight_of_eight_bits_is_named(saved: Callable[[str], Both], int8: Path, tmp_path: Path) -> None:
    reference = saved("resnet10t").file
    proto = onnx.load(int8)
    scales = next(value for value in proto.graph.initializer if value.name == "layer3.0.conv2.weight_scale")
    scales.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scales) * np.float32(2), scales.name))
    onnx.save(proto, tmp_path / "broken.onnx")
    found = first_apart_files(reference, tmp_path / "broken.onnx", images(), target=ORT, tolerance=0.1)
    assert found is not None
    assert (found.op, found.module) == ("Conv", "layer3.0.conv2")
