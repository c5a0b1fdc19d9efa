"""TensorRT as a target: what can be done here, engines with sidecars, plans refused before they are opened."""

from __future__ import annotations

import json
from importlib import util
from pathlib import Path

import pytest
import torch
from torch import nn

from slim.artifact import Preprocessing
from slim.errors import StoreError, TargetError
from slim.export.engine import read_sidecar
from slim.export.onnx import OnnxFile, export_onnx
from slim.export.runtime import runtimes
from slim.export.target import Target
from slim.store import content_digest

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU can do")
RTX = pytest.mark.skipif(util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")


def network(width: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)
        )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[OnnxFile, OnnxFile]:
    folder, small = tmp_path_factory.mktemp("engines"), Preprocessing(size=(3, 16, 16))
    first, second = (export_onnx(network(width), folder / f"{width}.onnx", small) for width in (8, 16))
    return first, second


@pytest.mark.skipif(util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_files_for_tensorrt_are_emitted_here_and_not_measured() -> None:
    assert runtimes()["tensorrt"].probe().level == "emit only"
    with pytest.raises(TargetError, match="emit only here: tensorrt is not installed; export here") as caught:
        Target.parse("tensorrt").probe()
    assert caught.value.exit_code == 5


@RTX
def test_engines_of_tensorrt_rtx_are_built_here_and_not_executed() -> None:
    state = runtimes()["tensorrt-rtx"].probe()
    assert state.level == "build only"
    assert "built ahead of time, not executed" in str(state)
    with pytest.raises(TargetError, match="build only here"):
        Target.parse("tensorrt-rtx").probe()


@RTX
def test_an_engine_has_a_sidecar_and_is_built_once(files: tuple[OnnxFile, OnnxFile], tmp_path: Path) -> None:
    target = Target.parse("tensorrt-rtx")
    first, second = files
    plan = target.on.build(first, lambda: network(8), tmp_path, target)
    sidecar = read_sidecar(plan.parent)
    assert (sidecar.onnx_sha256, sidecar.executed, sidecar.gpu) == (first.sha256, False, None)
    assert sidecar.version == runtimes()["tensorrt-rtx"].probe().version
    written = plan.stat().st_mtime_ns
    assert target.on.build(first, lambda: network(8), tmp_path, target) == plan
    assert plan.stat().st_mtime_ns == written
    other = target.on.build(second, lambda: network(16), tmp_path, target)
    assert read_sidecar(other.parent).onnx_sha256 == second.sha256
    larger = target.on.build(first, lambda: network(8), tmp_path, target.model_copy(update={"batch": 4}))
    assert read_sidecar(larger.parent).options["batch"] == [1, 4, 4]


@RTX
@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("version", "9.9.9.9", TargetError, "9.9.9.9"),
        ("arch", "aarch64-other", TargetError, "aarch64-other"),
        ("gpu", "Orin", TargetError, "Orin"),
        ("plan_sha256", "0" * 64, StoreError, "sha256"),
    ],
)
def test_a_plan_for_something_else_is_refused_before_it_is_opened(
    field: str, value: str, error: type[Exception], message: str, files: tuple[OnnxFile, OnnxFile], tmp_path: Path
) -> None:
    target = Target.parse("tensorrt-rtx")
    plan = target.on.build(files[0], lambda: network(8), tmp_path, target)
    path = plan.parent / "engine.json"
    content = json.loads(path.read_text()) | {field: value}
    path.write_text(json.dumps(content | {"digest": content_digest(content)}))
    opened = runtimes()["tensorrt-rtx"]
    with pytest.raises(error, match=message):
        opened.open(plan, threads=1, precision="fp32")
