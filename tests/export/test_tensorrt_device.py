"""The highest rung: engines built and executed where there is a GPU with TensorRT. Anywhere else these are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from slim.artifact import Preprocessing
from slim.bench import latency
from slim.bench.latency import Protocol
from slim.export.onnx import export_onnx
from slim.export.parity import parity
from slim.export.target import Target

pytestmark = pytest.mark.trt_device


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_computes_what_the_network_does_and_is_timed(name: str, tmp_path: Path) -> None:
    target = Target.parse(name)
    if (state := target.on.probe()).level != "ready":
        pytest.skip(f"{name}: {state}")
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    file = export_onnx(network, tmp_path / "network.onnx", Preprocessing(size=(3, 32, 32)))
    plan = target.on.build(file, lambda: network, tmp_path, target)
    # float32 layers may be computed in TF32, which has as many bits as half precision.
    found = parity(network, plan, torch.randn(1, 3, 32, 32), target=target, precision="fp16")
    assert found.n == 1
    timed = latency.latency(plan, target, seed=0, protocol=Protocol(sessions=3, rounds=4))
    assert timed.value > 0
