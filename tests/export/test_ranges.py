from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from slim.artifact import Preprocessing
from slim.errors import SlimError, StoreError, UsageError
from slim.export.onnx import OnnxFile, export_onnx
from slim.export.ranges import BINS, ENTROPY_BINS, layers, load, ranges, structure
from slim.export.target import Target
from slim.quantization import METHODS

TARGET = Target.parse("ort:cpu")
SMALL = Preprocessing(size=(3, 12, 12))


class Residual(nn.Module):
    """Convolution, batch norm, ReLU, a sum, a fully connected layer: the parts of a ResNet."""

    def __init__(self, *, kernel: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(8, 8, kernel, padding="same")
        self.last = nn.ReLU()
        self.fc = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(image)))
        return self.fc(self.last(x + self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Two products of activations; `heads` is a number in a target shape, nothing else."""

    def __init__(self, *, heads: int = 2) -> None:
        super().__init__()
        self.qkv = nn.Linear(36, 24)
        self.fc = nn.Linear(8, 5)
        self.heads = heads

    def forward(self, image: Tensor) -> Tensor:
        q, k, v = self.qkv(image.reshape(-1, 12, 36)).reshape(-1, 12, self.heads, 24 // self.heads).chunk(3, -1)
        weights = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).softmax(-1)
        return self.fc((weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2).mean(1))  # type: ignore[no-any-return]


class Odd(nn.Module):
    """Tensors that are no number, the same everywhere, or nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 12 * 12, 5)

    def forward(self, image: Tensor) -> Tensor:
        flat = image.flatten(1)
        nothing, five = torch.relu(-flat.abs()), 5 + torch.tanh(1e-9 * flat)
        endless = torch.exp(flat.abs() * 1000)
        return self.fc(flat * five + nothing) + 1 / endless.mean(1, keepdim=True)  # type: ignore[no-any-return]


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


Save = Callable[[nn.Module], OnnxFile]


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Save:
    folder = tmp_path_factory.mktemp("ranges")
    return lambda model: export_onnx(model, folder / f"{len(list(folder.iterdir()))}.onnx", SMALL)


@pytest.fixture(scope="module")
def residual(save: Save) -> OnnxFile:
    return save(seeded(Residual))


@pytest.fixture(scope="module")
def attention(save: Save) -> OnnxFile:
    return save(seeded(Attention))


# Names


def test_layers_are_named_by_their_modules_in_the_order_of_the_graph(residual: OnnxFile, attention: OnnxFile) -> None:
    assert layers(residual) == ("stem/Conv/0", "conv/Conv/0", "fc/Gemm/0")
    products = [node for node in load(attention.path).graph.node if node.op_type == "MatMul"]
    assert len(products) == 3
    assert layers(attention) == ("qkv/MatMul/0", "fc/Gemm/0")


def test_the_names_of_an_exporter_change_neither_keys_nor_structure(residual: OnnxFile, tmp_path: Path) -> None:
    proto = load(residual.path)
    ports = {"image", "logits", ""}
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [name if name in ports else f"t.{name}" for name in names]
    for value in proto.graph.initializer:
        value.name = f"t.{value.name}"
    scopes = {f"n.{name}": scope for name, scope in residual.scopes.items()}
    for node in proto.graph.node:
        node.name = f"n.{node.name}"
    del proto.graph.value_info[:]
    onnx.save(proto, tmp_path / "renamed.onnx")
    renamed = replace(residual, path=tmp_path / "renamed.onnx", scopes=scopes)
    assert layers(renamed) == layers(residual)
    assert structure(renamed) == structure(residual)
    found = [ranges(file, [images(2)], "minmax", TARGET, 1) for file in (renamed, residual)]
    assert found[0] == found[1]


def test_structure_is_indifferent_to_weights_and_sees_everything_else(
    residual: OnnxFile, attention: OnnxFile, save: Save, tmp_path: Path
) -> None:
    assert structure(save(seeded(Residual, 1))) == structure(residual)
    # The number of heads changes target shapes alone: whole numbers, which are no weights.
    assert structure(save(seeded(lambda: Attention(heads=4)))) != structure(attention)

    def edited(edit: Callable[[onnx.GraphProto], None]) -> str:
        proto = load(residual.path)
        edit(proto.graph)
        onnx.save(proto, tmp_path / "edited.onnx")
        return structure(replace(residual, path=tmp_path / "edited.onnx"))

    def first(graph: onnx.GraphProto, operator: str) -> onnx.NodeProto:
        found: onnx.NodeProto = next(node for node in graph.node if node.op_type == operator)
        return found

    def widen(graph: onnx.GraphProto) -> None:
        graph.input[0].type.tensor_type.shape.dim[3].dim_value = 14

    def unpad(graph: onnx.GraphProto) -> None:
        next(entry for entry in first(graph, "Conv").attribute if entry.name == "pads").ints[0] += 1

    def reshape(graph: onnx.GraphProto) -> None:
        bias = next(value for value in graph.initializer if value.name == first(graph, "Gemm").input[2])
        bias.CopyFrom(onnx.numpy_helper.from_array(np.zeros(1, np.float32), bias.name))

    def swap(graph: onnx.GraphProto) -> None:
        add = first(graph, "Add")
        add.input[:] = reversed(add.input)

    assert edited(lambda graph: None) == structure(residual)
    digests = {edited(edit) for edit in (widen, unpad, reshape, swap)}
    digests.add(edited(lambda graph: setattr(first(graph, "Relu"), "op_type", "Softplus")))
    assert len(digests | {structure(residual)}) == 6


def test_a_broken_file_is_one_line(residual: OnnxFile, tmp_path: Path) -> None:
    torn = tmp_path / "torn.onnx"
    torn.write_bytes(residual.path.read_bytes()[:-50])
    with pytest.raises(StoreError, match=r"torn\.onnx: not a whole ONNX file .*; export it again"):
        layers(replace(residual, path=torn))


# Ranges


def test_ranges_of_minmax_are_the_ends_of_what_torch_computes(residual: OnnxFile) -> None:
    model, batch = seeded(Residual), images(20)
    ends: dict[str, tuple[float, float]] = {}
    for name in ("norm", "relu", "conv", "last", "fc"):
        model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: ends.update({name: (output.min().item(), output.max().item())})
        )
    with torch.no_grad():
        model(batch)
    found = ranges(residual, torch.split(batch, 7), "minmax", TARGET, 1)
    assert found.pop("image") == (batch.min().item(), batch.max().item())
    # A batch norm is folded into its convolution, whose name it takes.
    keys = {"stem/Conv/0": "norm", "relu/Relu/0": "relu", "conv/Conv/0": "conv", "last/Relu/0": "last"}
    for key, name in (keys | {"fc/Gemm/0": "fc"}).items():
        # Sums of at most 72 products of order 1 in float32, in another order: units in the last place, 1e-7 each.
        assert found.pop(key) == pytest.approx(ends[name], abs=1e-5), key
    assert all(key.rpartition("/")[0] in ("/Add", "/ReduceMean") for key in found), found


@pytest.mark.parametrize("method", METHODS)
def test_the_size_of_a_batch_and_the_order_of_images_change_nothing(residual: OnnxFile, method: str) -> None:
    dark, light = 1e-4 * images(3), images(17, seed=1)
    batch = torch.cat([dark, light])
    once = ranges(residual, [batch], method, TARGET, 1)
    assert ranges(residual, torch.split(batch, 3), method, TARGET, 1) == once
    assert ranges(residual, [light, dark], method, TARGET, 1) == once


def test_what_is_kept_lies_within_and_grows_with_the_share(residual: OnnxFile, attention: OnnxFile) -> None:
    for file in (residual, attention):
        all_, most, fewer, likeliest = (
            ranges(file, [images(50)], method, TARGET, 1)
            for method in ("minmax", "percentile-99.99", "percentile-99.9", "entropy")
        )
        assert all_.keys() == most.keys() == fewer.keys() == likeliest.keys()
        for key, (low, high) in all_.items():
            assert low <= most[key][0] <= fewer[key][0] <= fewer[key][1] <= most[key][1] <= high, key
            assert low <= likeliest[key][0] <= likeliest[key][1] <= high, key
        assert all_ != most != fewer != all_ != likeliest


def test_percentiles_are_those_of_the_values_to_a_bin(residual: OnnxFile) -> None:
    batch = images(250).clip(-3.9, 3.9)
    low, high = ranges(residual, [batch], "percentile-99.9", TARGET, 1)["image"]
    # At most 0.05 % go on either side, and one bin further in it would be as many or more. The histogram reaches to 4,
    # the power of two above 3.9.
    values = batch.numpy()
    assert np.mean(values < low) <= 0.0005 <= np.mean(values < low + 8 / BINS)
    assert np.mean(values > high) <= 0.0005 <= np.mean(values > high - 8 / BINS)


def test_the_entropy_search_cuts_off_what_is_rare(residual: OnnxFile) -> None:
    batch = images(100)
    batch[0, 0, 0, 0] = 40.0  # one value of 43,200, ten times as large as the next
    low, high = ranges(residual, [batch], "entropy", TARGET, 1)["image"]
    # The histogram reaches to 64; the search starts at 64 of its 512 bins on either side, the lowest value is -5.
    assert 64 * 64 / (ENTROPY_BINS / 2) <= high < 20
    assert low == batch.min().item()


@pytest.mark.parametrize("method", METHODS)
def test_tensors_without_spread_have_a_range_and_endless_ones_none(save: Save, method: str) -> None:
    found = ranges(save(seeded(Odd)), [images(8)], method, TARGET, 1)
    assert found["/Relu/0"] == (0.0, 0.0)
    low, high = found["/Add/0"]
    assert low <= 5 <= high
    assert high - low < 1e-3
    assert "/Exp/0" not in found
    assert {"image", "fc/Gemm/0"} < found.keys()


def test_images_that_do_not_fit_and_methods_that_do_not_exist_are_usage_errors(residual: OnnxFile) -> None:
    with pytest.raises(UsageError, match="no images to find ranges on; give at least one"):
        ranges(residual, [], "minmax", TARGET, 1)
    with pytest.raises(UsageError, match=r"takes images \(3, 12, 12\), these are \(3, 12, 13\)"):
        ranges(residual, [torch.zeros(2, 3, 12, 13)], "minmax", TARGET, 1)
    with pytest.raises(UsageError, match=r"unknown method 'minmix'; did you mean 'minmax'\?"):
        ranges(residual, [images(1)], "minmix", TARGET, 1)


def test_a_file_that_fails_while_running_is_one_line(residual: OnnxFile, tmp_path: Path) -> None:
    proto = load(residual.path)
    add = next(node for node in proto.graph.node if node.op_type == "Add")
    add.input[1] = "image"  # sizes that cannot be added, found when it runs
    del proto.graph.value_info[:]
    onnx.save(proto, tmp_path / "broken.onnx")
    with pytest.raises(
        SlimError, match=r"broken\.onnx: ONNX Runtime cannot (run|load) it: .*; export it again"
    ) as caught:
        ranges(replace(residual, path=tmp_path / "broken.onnx"), [images(1)], "minmax", TARGET, 1)
    assert "\n" not in str(caught.value)


def test_calibration_says_nothing(residual: OnnxFile, capfd: pytest.CaptureFixture[str]) -> None:
    for method in METHODS:
        ranges(residual, [images(2)], method, TARGET, 1)
    assert capfd.readouterr() == ("", "")
