"""The table of layers: what is timed is what the network would run, each kind once, on the target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from slim.artifact import Preprocessing
from slim.bench.measure import TargetMeter
from slim.bench.table import ROUNDS, Entry, layer_table
from slim.contract import Meter
from slim.errors import SlimError
from slim.export.onnx import export_onnx
from slim.export.target import Target
from slim.measurement import Measurement

pytestmark = pytest.mark.usefixtures("one_thread")
TARGET = Target.parse("ort:cpu,threads=1")
INPUT = Preprocessing(size=(3, 16, 16), crop=1.0)


def linear_pair(inputs: int, rank: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs))


def spatial_pair(channels: int, rank: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, rank, (3, 1), padding=(1, 0), bias=False), nn.Conv2d(rank, channels, (1, 3), padding=(0, 1))
    )


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.onnx"))


def operators(path: Path) -> list[str]:
    return sorted(node.op_type for node in onnx.load(path).graph.node)


# (768 * 768) / (768 + 768) = 384 and 3 * 128 * 128 / (128 + 128) = 192 are the ranks of break-even; a quarter of that
# is a quarter of the work.
WIDE: list[Entry] = [
    (nn.Linear(768, 768), (64, 768)),
    (linear_pair(768, 96, 768), (64, 768)),
    (nn.Conv2d(128, 128, 3, padding=1), (128, 14, 14)),
    (spatial_pair(128, 48), (128, 14, 14)),
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> list[Measurement]:
    return layer_table(WIDE, TARGET, tmp_path_factory.mktemp("wide"), seed=0)


@pytest.mark.parametrize("dense", [0, 2], ids=["linear", "convolution"])
def test_a_pair_with_a_quarter_of_the_work_is_far_faster(wide: list[Measurement], dense: int) -> None:
    layer, pair = wide[dense], wide[dense + 1]
    # Their intervals are far apart, and half the time is more than any machine's noise leaves of a quarter.
    assert pair.high is not None
    assert layer.low is not None
    assert pair.high < layer.low
    assert pair.value < 0.6 * layer.value


def test_a_value_is_the_median_of_its_rounds_and_its_interval_their_range(wide: list[Measurement]) -> None:
    for found in wide:
        assert (found.unit, found.target, found.n) == ("ms", str(TARGET), ROUNDS)
        low, *_, high = rounds = sorted(found.samples)
        assert found.value == pytest.approx((rounds[2] + rounds[3]) / 2, abs=1e-6)  # of six; samples are rounded
        assert (found.low, found.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


def test_figures_come_in_the_order_of_the_entries_and_equal_ones_are_measured_once(tmp_path: Path) -> None:
    # One layer with two inputs is two entries; shapes that alternate are still exported together.
    kinds: list[Entry] = [(nn.Linear(8, 16), (4, 8)), (nn.Linear(8, 16), (8,)), (nn.Linear(8, 32), (4, 8))]
    again: list[Entry] = [(nn.Linear(8, 32), (4, 8)), (nn.Linear(8, 16), (4, 8))]
    found = layer_table([*kinds, *again], TARGET, tmp_path, seed=0)
    assert [(one.details["layer"], one.details["input"]) for one in found] == [
        (str(layer), str(shape)) for layer, shape in [*kinds, *again]
    ]
    assert (found[3], found[4]) == (found[2], found[0])
    assert sorted(map(operators, files(tmp_path))) == [["Add", "MatMul"], ["Add", "MatMul"], ["Gemm"]]


def test_nothing_asked_is_nothing_measured(tmp_path: Path) -> None:
    assert layer_table([], TARGET, tmp_path, seed=0) == []


class Network(nn.Module):
    """Each kind of layer and its pair, apart from each other: convolutions on maps, Linear layers on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.conv_pair = spatial_pair(3, 2)
        self.linear = nn.Linear(3, 3)
        self.linear_pair = linear_pair(3, 2, 3)
        self.head = nn.Linear(3, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv_pair(self.conv(images).relu()).relu()
        tokens = self.linear_pair(self.linear(maps.flatten(2).transpose(1, 2)).relu())
        return self.head(tokens.mean(1))  # type: ignore[no-any-return]


def test_a_layer_alone_has_the_operators_it_has_in_a_network(tmp_path: Path) -> None:
    network = Network()
    inside = export_onnx(network, tmp_path / "network.onnx", INPUT)
    expected: dict[str, list[str]] = {}
    for node in onnx.load(inside.path).graph.node:
        expected.setdefault(inside.scopes[node.name].partition(".")[0], []).append(node.op_type)
    shapes = {"conv": (3, 16, 16), "conv_pair": (3, 16, 16), "linear": (256, 3), "linear_pair": (256, 3), "head": (3,)}
    (tmp_path / "table").mkdir()
    layer_table(
        [(network.get_submodule(name), shape) for name, shape in shapes.items()], TARGET, tmp_path / "table", seed=0
    )
    # Those of two layers that share a shape were cut out of one graph.
    assert sorted(map(operators, files(tmp_path / "table"))) == sorted(sorted(expected[name]) for name in shapes)
    assert sorted(expected["linear_pair"]) == ["Add", "MatMul", "MatMul"]  # not Gemm, which a (B, C) input gives


def test_values_play_no_part_and_the_layer_is_left_as_it_was(tmp_path: Path) -> None:
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight.zero_()
    layer.train()
    layer_table([(layer, (8,))], TARGET, tmp_path, seed=0)
    assert not layer.weight.any()
    assert layer.training
    (path,) = files(tmp_path)
    for value in onnx.load(path).graph.initializer:
        assert abs(onnx.numpy_helper.to_array(value)).min() >= 0.5


def test_it_is_timed_at_the_batch_of_the_target(tmp_path: Path) -> None:
    entry: Entry = (nn.Linear(256, 256), (16, 256))
    (one,) = layer_table([entry], TARGET, tmp_path, seed=0)
    (many,) = layer_table([entry], TARGET.model_copy(update={"batch": 32}), tmp_path, seed=0)
    # 32 times the work in matrices that are larger already; what a call costs besides is small against 16 rows.
    assert many.value > 8 * one.value


def test_a_layer_that_does_not_take_its_shape_is_named_on_one_line(tmp_path: Path) -> None:
    said = (
        r"^layers: 1 with inputs of \(9,\), from Sequential\( \(0\): Linear\(in_features=8.* as ONNX: \w+: .*9.*; leave"
    )
    with pytest.raises(SlimError, match=said) as caught:
        layer_table([(linear_pair(8, 4, 8), (9,))], TARGET, tmp_path, seed=0)
    assert "\n" not in str(caught.value)


def test_progress_counts_exports_and_rounds(tmp_path: Path) -> None:
    shown: list[int] = []

    @contextmanager
    def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
        yield lambda steps, note="": shown.append(steps)
        assert sum(shown) == total

    layer_table([(nn.Linear(8, 8), (8,)), (nn.Linear(8, 4), (8,))], TARGET, tmp_path, seed=0, progress=progress)
    assert shown == [2] + [1] * 2 * ROUNDS


def test_the_meter_measures_only_what_it_was_not_asked_before(tmp_path: Path) -> None:
    meter: Meter = TargetMeter(TARGET, None, tmp_path)
    small, large = (nn.Linear(8, 8), (8,)), (nn.Linear(8, 64), (8,))
    first = meter.table([small, large])
    times = {path: path.stat().st_mtime_ns for path in files(tmp_path)}
    again = meter.table([large, (nn.Linear(8, 16), (8,)), (nn.Linear(8, 8), (8,))])
    assert (again[0], again[2]) == (first[1], first[0])
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert len(files(tmp_path)) == 3
