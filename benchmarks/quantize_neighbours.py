"""INT8 files as the runtimes' own tools make them, each called as its documentation shows.

    python -m benchmarks.quantize_neighbours FLOAT.onnx IMAGES.npy FOLDER    # writes ort-int8.onnx and nncf-int8.xml

IMAGES is an array (N, C, H, W) float32 to calibrate on. A program of its own: the tools change loggers and torch for
the whole process. NNCF is needed by this benchmark alone: pip install nncf
"""

from __future__ import annotations

import sys
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np

ORT, NNCF = "ort-int8.onnx", "nncf-int8.xml"


def onnxruntime_int8(source: Path, images: np.ndarray[Any, Any], out: Path) -> None:
    """ONNX Runtime's static quantization: QDQ, uint8 activations, int8 weights for each channel, min-max."""
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = onnx.load(source).graph.input[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc] # it has no type information
        def __init__(self) -> None:
            self.rest = iter(images)

        def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
            image = next(self.rest, None)
            return None if image is None else {name: image[None]}

    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared))
    quantize_static(
        str(prepared),
        str(out),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )


def nncf_int8(source: Path, images: np.ndarray[Any, Any], out: Path) -> None:
    """NNCF's post-training quantization for OpenVINO, default preset, on all `images`."""
    import nncf  # type: ignore[import-untyped]
    import openvino

    dataset = nncf.Dataset([image[None] for image in images])
    model = nncf.quantize(openvino.Core().read_model(source), dataset, subset_size=len(images))
    openvino.save_model(model, out)


def main() -> None:
    source, images, folder = map(Path, sys.argv[1:])
    if util.find_spec("nncf") is None:
        sys.exit("nncf is not installed, and this benchmark measures against it; pip install nncf")
    values = np.load(images)
    onnxruntime_int8(source, values, folder / ORT)
    nncf_int8(source, values, folder / NNCF)


if __name__ == "__main__":
    main()
