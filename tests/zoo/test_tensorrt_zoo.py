"""Real timm families become plans of TensorRT-RTX, for a range of batches: in float32, half precision and INT8.

Takes minutes, so `make test` leaves it out: `make test-zoo`. Nothing is executed: no GPU is needed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest

from slim.artifact import Artifact
from slim.export.half import export_half
from slim.export.onnx import OnnxFile, export_onnx
from slim.export.quantized import write
from slim.export.ranges import ranges, structure
from slim.export.target import Target
from slim.export.tensorrt import BuildOptions, build
from slim.quantization import Quantization
from tests.zoo.networks import built, images_of
from tests.zoo.test_families import FAMILIES

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx") is None,
        reason="tensorrt_rtx is not installed: pip install 'slim[rtx]'",
    ),
]

BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
"""Of one weight."""

Exported = Callable[[str], tuple[Artifact, OnnxFile]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Family -> its network and its float file; only the last is kept."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"

    @lru_cache(maxsize=1)
    def export(family: str) -> tuple[Artifact, OnnxFile]:
        kwargs, pixels, _ = FAMILIES[family]
        given = built(family, kwargs, pixels)
        return given, export_onnx(given.model(), path, given.backbone.input)

    return export


@pytest.mark.parametrize("precision", BYTES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_becomes_a_plan(family: str, precision: str, exported: Exported, tmp_path: Path) -> None:
    given, file = exported(family)
    if precision == "fp16":
        file = export_half(given.model(), (), tmp_path / "half.onnx", given.backbone.input)
    elif precision == "int8":
        seen = ranges(file, [images_of(given, 4)], "minmax", Target.parse("ort:cpu"), 1)
        decided = Quantization(graph=structure(file), method="minmax", ranges=seen)
        file = write(file, decided, "s8", tmp_path / "int8.onnx")
    plan = build("tensorrt_rtx", file.path, BuildOptions(batch=(1, 2, 4))).plan
    assert plan[:4] == b"vtrt"
    assert len(plan) > BYTES[precision] * given.costs["params"]
