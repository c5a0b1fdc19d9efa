from __future__ import annotations

import logging
import os
import resource
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from slim.artifact import Preprocessing, state_digest
from slim.errors import SlimError, StoreError, UsageError
from slim.export import onnx as exporter
from slim.export.onnx import OnnxFile, Port, export_onnx, read_ports

SMALL = Preprocessing(size=(3, 16, 24))


class Caching(nn.Module):
    """Keeps a tensor on itself while it runs, which the tracer warns about."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 5)
        self.cache: dict[str, Tensor] = {}

    def forward(self, image: Tensor) -> Tensor:
        self.cache["mean"] = image.mean()
        return self.head(self.features(image).mean((2, 3)))  # type: ignore[no-any-return]


class Head(nn.Module):
    """One linear layer with the reshape, or whatever else, of a test."""

    def __init__(self, forward: Callable[[nn.Linear, Tensor], object]) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 16 * 24, 5)
        self.body = forward

    def forward(self, image: Tensor) -> object:
        return self.body(self.fc, image)


def branching(fc: nn.Linear, image: Tensor) -> Tensor:
    flat = image.flatten(1)
    return fc(flat) if image.sum() > 0 else fc(-flat)  # type: ignore[no-any-return]


def network(seed: int = 0) -> Caching:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Caching().eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> OnnxFile:
    return export_onnx(network(), tmp_path_factory.mktemp("onnx") / "model.onnx", SMALL)


def test_the_record_is_what_the_file_holds(exported: OnnxFile) -> None:
    import hashlib

    data = exported.path.read_bytes()
    proto = onnx.load_from_string(data)
    assert exported.sha256 == hashlib.sha256(data).hexdigest()
    assert exported.size_bytes == len(data)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", exported.opset)] == [("", 20)]
    assert exported.ir_version == proto.ir_version
    assert exported.nodes == len(proto.graph.node)
    assert exported.inputs == (Port("image", "float32", ("batch", 3, 16, 24)),)
    assert exported.outputs == (Port("logits", "float32", ("batch", 5)),)
    assert exported.batch_range == (1, 64)


def test_ports_are_read_from_a_file_and_a_broken_one_is_one_line(exported: OnnxFile, tmp_path: Path) -> None:
    assert read_ports(exported.path) == (exported.inputs, exported.outputs)
    torn = tmp_path / "torn.onnx"
    torn.write_bytes(exported.path.read_bytes()[:-100])
    for path in (torn, tmp_path / "none.onnx"):
        with pytest.raises(StoreError, match=r"\.onnx: not a whole ONNX file \(.*\); export it again") as caught:
            read_ports(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_file_computes_what_the_network_computes_at_any_batch(exported: OnnxFile, batch: int) -> None:
    images = torch.randn(batch, 3, 16, 24, generator=torch.Generator().manual_seed(batch))
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": images.numpy()})
    with torch.no_grad():
        # A handful of float32 operations of order 1: a few units in the last place, 1e-7 each.
        np.testing.assert_allclose(logits, network()(images).numpy(), atol=2e-6)


def test_nothing_of_the_building_machine_is_in_the_file(exported: OnnxFile) -> None:
    data = exported.path.read_bytes()
    for trace in (sys.prefix, str(Path.cwd()), str(Path.home()), "site-packages", ".py", "stack_trace", __name__):
        assert trace.encode() not in data, trace


def test_every_node_is_traced_back_to_a_module_and_a_folded_batch_norm_to_its_convolution(exported: OnnxFile) -> None:
    nodes = {node.name: node.op_type for node in onnx.load(exported.path).graph.node}
    assert set(exported.scopes) == set(nodes)
    assert set(exported.scopes.values()) <= set(dict(network().named_modules()))
    assert {exported.scopes[name] for name, op in nodes.items() if op == "Conv"} == {"features.0"}
    assert {exported.scopes[name] for name, op in nodes.items() if op == "Relu"} == {"features.2"}
    assert {exported.scopes[name] for name, op in nodes.items() if op == "Gemm"} == {"head"}


def test_the_same_network_gives_the_same_bytes(exported: OnnxFile, tmp_path: Path) -> None:
    again = export_onnx(network(), tmp_path / "again.onnx", SMALL)
    assert again.path.read_bytes() == exported.path.read_bytes()


def test_the_network_is_left_as_it_was(tmp_path: Path) -> None:
    model = network().train()
    model.features[1].eval()  # a frozen batch norm in a network that is being trained
    flags = [module.training for module in model.modules()]
    before = state_digest(model.state_dict())
    export_onnx(model, tmp_path / "model.onnx", SMALL)
    assert [module.training for module in model.modules()] == flags
    assert state_digest(model.state_dict()) == before
    assert model.cache == {}
    assert torch.is_grad_enabled()
    assert model(torch.zeros(2, 3, 16, 24)).requires_grad


def test_export_is_silent_and_leaves_loggers_as_they_were(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    levels = [logging.getLogger(name).level for name in exporter.NOISY]
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        export_onnx(network(), tmp_path / "model.onnx", SMALL)
        with pytest.raises(SlimError):
            export_onnx(Head(branching), tmp_path / "model.onnx", SMALL)
    # torch keeps a structured trace at debug level whatever happens; no handler shows it unless asked for.
    logged = [record for record in caplog.records if record.levelno > logging.DEBUG]
    assert (*capfd.readouterr(), logged, shown) == ("", "", [], [])
    assert [logging.getLogger(name).level for name in exporter.NOISY] == levels


def test_a_network_that_cannot_be_traced_is_named_with_the_reason_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the file of yesterday")
    with pytest.raises(SlimError, match=r"export: Head cannot be written as ONNX: .*data-dependent") as caught:
        export_onnx(Head(branching), path, SMALL)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"the file of yesterday"
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_a_network_that_fixes_its_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SlimError, match=r"dynamo: it fixes its batch: 'image' came out as \(2, 3, 16, 24\); reshape"):
        export_onnx(Head(lambda fc, image: fc(image.reshape(2, -1))), tmp_path / "model.onnx", SMALL)
    assert os.listdir(tmp_path) == []


def test_a_network_with_two_outputs_is_refused(tmp_path: Path) -> None:
    model = Head(lambda fc, image: (fc(image.flatten(1)), fc(-image.flatten(1))))
    with pytest.raises(SlimError, match=r"returns \('batch', 5\), \('batch', 5\); a backbone returns one tensor"):
        export_onnx(model, tmp_path / "model.onnx", SMALL)


def test_another_opset_than_asked_for_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The exporter has no opset 17 of its own, fails to convert ReduceMean down to it, and quietly leaves 18.
    monkeypatch.setattr(exporter, "OPSET", 17)
    with pytest.raises(SlimError, match="Caching came out with opset 18, asked was 17"):
        export_onnx(network(), tmp_path / "model.onnx", SMALL)
    assert os.listdir(tmp_path) == []


def test_values_that_do_not_fit_one_file_are_refused_before_tracing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "MAX_BYTES", 1000)
    with pytest.raises(SlimError, match=r"Caching holds 1\.\d+e-06 GB of values, one ONNX file holds at most 1e-06 GB"):
        export_onnx(network(), tmp_path / "model.onnx", SMALL)


@pytest.mark.parametrize("batch_range", [(0, 64), (3, 64), (1, 2)])
def test_a_batch_range_without_the_traced_batch_is_refused(tmp_path: Path, batch_range: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=r"batch range \d\.\.\d+ must start at 1 or 2 and end above it"):
        export_onnx(network(), tmp_path / "model.onnx", SMALL, batch_range=batch_range)


def test_a_full_disk_leaves_the_old_file_whole_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the file of yesterday")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
    try:
        with pytest.raises(StoreError, match=r"model\.onnx: cannot be written: File too large; nothing was replaced"):
            export_onnx(network(), path, SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"the file of yesterday"
    assert os.listdir(tmp_path) == ["model.onnx"]
