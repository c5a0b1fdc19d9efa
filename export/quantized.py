"""INT8 in an ONNX file: the layers that can have it, the file written from stored ranges, and what of it runs as INT8.

No graph serves every runtime. `u8` has uint8 activations around every operator ONNX Runtime has an INT8 kernel for;
TensorRT's parser refuses it. `s8` has int8 activations with zero point 0 on the inputs of layers alone, and float
biases: TensorRT and OpenVINO take it, ONNX Runtime's CPU kernels mostly do not. Weights are int8, symmetric for each
output channel. Attention's products of two activations stay float in `s8`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from slim.errors import SlimError, StoreError, did_you_mean
from slim.export.onnx import OnnxFile, quiet, reason
from slim.export.ranges import LAYERS, layer_nodes, load, need_onnxruntime, node_keys, tensor_keys
from slim.export.ranges import layers as layers
from slim.export.ranges import structure as structure
from slim.quantization import Quantization
from slim.store import write_bytes

KERNELS = {"QLinearConv", "ConvInteger", "QLinearMatMul", "QGemm", "MatMulInteger", "MatMulIntegerToFloat"}
"""What ONNX Runtime's CPU provider calls a layer that it computes in INT8."""

MOVES = {"Concat", "Expand", "Flatten", "Gather", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Transpose"}
"""Operators that only move values."""

BY_CHOICE, NOT_FUSED = "left float by choice", "not fused"


@dataclass(frozen=True)
class Coverage:
    """How much of a file ONNX Runtime's CPU provider computes in INT8."""

    fused: int
    """Layers that run as INT8 kernels."""
    of: int
    """Layers: Conv, Gemm and MatMul with constant weights."""
    floats: dict[str, str]
    """Node name of each layer that runs in float -> why: it was left so, or the provider has no kernel for it."""


U8: dict[str, Any] = {"QDQKeepRemovableActivations": True}
"""A layer left in float behind a ReLU would otherwise read what was before it; ONNX Runtime drops it when it loads."""


def write(file: OnnxFile, quantization: Quantization, form: Literal["u8", "s8"], path: Path) -> OnnxFile:
    """The float `file` as INT8 at `path`, in `form`: the same bytes each time, and no data needed.

    Raises:
        StoreError: `quantization` is another graph's, lacks a range, or `path` cannot be written.
        SlimError: ONNX Runtime's quantizer fails.
        MissingExtra: ONNX Runtime is not installed.
    """
    need_onnxruntime(str(path))
    if (found := structure(file)) != quantization.graph:
        raise StoreError(
            f"{file.path}: its graph is {found[:12]}, the stored ranges are for {quantization.graph[:12]}; "
            "run quantize again on this network"
        )
    proto = load(file.path)
    keys = node_keys(proto.graph, file.scopes)
    names = {keys[node.name]: node.name for node in layer_nodes(proto.graph)}
    for key in quantization.floats:
        if key not in names:
            raise StoreError(
                f"{file.path}: {key!r}, to be left in float, is not a layer of it{did_you_mean(key, names)}"
            )
    floats = {names[key] for key in quantization.floats}
    tensors = tensor_keys(proto.graph, file.scopes)
    known = {name: quantization.ranges[key] for name, key in tensors.items() if key in quantization.ranges}
    try:
        with _silent():
            written = _quantize(proto, known, form, chosen=[n for n in names.values() if n not in floats])
            _restore(written.graph, proto.graph, floats)
            onnx.checker.check_model(written, full_check=True)
    except Exception as error:  # the quantizer has no exceptions of its own
        for name, key in tensors.items():
            if name not in known and f"param {name}." in str(error):
                raise StoreError(
                    f"{file.path}: tensor {key!r} needs a range and has none; run quantize again, and if it is left "
                    "without one again, its values are not finite: leave the layers around it in float"
                ) from error
        raise SlimError(f"{file.path}: cannot be written as INT8 ({form}): {reason(error)}") from error
    data = written.SerializeToString(deterministic=True)
    write_bytes(path, data)
    return replace(
        file,
        path=path,
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        nodes=len(written.graph.node),
        scopes=_scopes(written.graph, file.scopes),
        parity=None,  # that of the float file
    )


def coverage(path: Path) -> Coverage:
    """How many layers of the file at `path` ONNX Runtime's CPU provider computes in INT8.

    Raises:
        StoreError: not a whole ONNX file, or ONNX Runtime cannot load it.
        MissingExtra: ONNX Runtime is not installed.
    """
    need_onnxruntime(str(path))
    import onnxruntime

    graph = load(path).graph
    constants = {value.name for value in graph.initializer}
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"} & {
        node.output[0] for node in graph.node if node.input and node.input[0] in constants
    }
    found = [node for node in graph.node if node.op_type in LAYERS and node.input[1] in constants | dequantized]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # The level above only moves memory about, and gives the nodes other names.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        try:
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's own exceptions share no base class
            raise StoreError(f"{path}: ONNX Runtime cannot load it: {reason(error)}; write it again") from error
        kernels = {node.name: node.op_type for node in load(Path(options.optimized_model_filepath)).graph.node}
    floats = {
        node.name: NOT_FUSED if node.input[1] in dequantized else BY_CHOICE
        for node in found
        if kernels.get(node.name) not in KERNELS
    }
    return Coverage(len(found) - len(floats), len(found), floats)


def _quantize(
    proto: onnx.ModelProto,
    ranges: dict[str, tuple[float, float]],
    form: Literal["u8", "s8"],
    *,
    chosen: Sequence[str],
) -> onnx.ModelProto:
    """`proto` with Q and DQ nodes, in no order. `chosen`: names of the layers to be INT8."""
    from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, TensorData, TensorsData
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    model = onnx.shape_inference.infer_shapes(proto)
    # Its word for "shapes are inferred": without it the quantizer does that through files of its own.
    onnx.helper.set_model_props(model, {"onnx.infer": "onnxruntime.quant"})
    types = {node.op_type for node in model.graph.node}
    floats = [node.name for node in layer_nodes(model.graph) if node.name not in chosen]
    if form == "u8":
        activations, operators, options = QuantType.QUInt8, {*QDQRegistry, *QLinearOpsRegistry}, U8
        excluded = [*floats, *_residual_stream(model.graph)]
    else:
        activations, operators = QuantType.QInt8, set(LAYERS)
        excluded = [node.name for node in model.graph.node if node.name not in chosen]
        options = {
            "ActivationSymmetric": True,
            "QuantizeBias": False,
            "QDQDisableWeightAdjustForInt32Bias": True,
            "OpTypesToExcludeOutputQuantization": sorted(types),
        }
    data = {
        name: TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32))
        for name, (low, high) in ranges.items()
    }
    known = TensorsData(CalibrationMethod.MinMax, data)
    quantizer = QDQQuantizer(
        model, True, False, QuantType.QInt8, activations, known, [], excluded, sorted(operators), options
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    written: onnx.ModelProto = quantizer.model.model
    # Its notes, and the shapes of tensors that are no more.
    written.ClearField("metadata_props")
    written.graph.ClearField("value_info")
    written.producer_name, written.producer_version = proto.producer_name, proto.producer_version
    return written


def _residual_stream(graph: onnx.GraphProto) -> list[str]:
    """Names of the LayerNormalizations, and of what is handed to one as a sum or moved.

    There is no INT8 kernel for it, and a sum over all blocks has values too far apart for 8 bits: a random ViT-Tiny
    whose sums are INT8 as well agrees with itself in float on one image of eight.
    """
    stream: set[str] = set()
    wanted: set[str] = set()
    for node in reversed(graph.node):
        if node.op_type == "LayerNormalization" or (
            node.op_type in {"Add", *MOVES} and not wanted.isdisjoint(node.output)
        ):
            stream.add(node.name)
            if node.op_type != "Add":
                wanted.update(node.input[:1])
    return sorted(stream)


def _restore(written: onnx.GraphProto, original: onnx.GraphProto, floats: set[str]) -> None:
    """Give layers left in float what they read before; the quantizer hands a tensor's Q and DQ to all who read it.

    Activations as well: a layer with float weights between a DQ and a Q has them quantised, one scale for all, by ONNX
    Runtime when it loads the file (WeightBiasQuantization).
    """
    before = {node.name: node.input for node in original.node}
    constants = {value.name: value for value in original.initializer}
    here = {value.name for value in written.initializer} | {name for node in written.node for name in node.output}
    for node in written.node:
        if node.name not in floats:
            continue
        for index, name in enumerate(before[node.name]):
            node.input[index] = name
            if name in constants and name not in here:
                here.add(name)
                written.initializer.append(constants[name])


def _scopes(graph: onnx.GraphProto, scopes: dict[str, str]) -> dict[str, str]:
    """Scopes of nodes that were there, and of Q and DQ nodes: the tensor's maker's, the reader's of a weight."""
    makers = {name: node for node in graph.node for name in node.output}
    readers = {name: node for node in graph.node for name in node.input}
    found: dict[str, str] = {}
    for node in graph.node:
        around = node
        while around.name not in scopes and around.input[0] in makers:
            around = makers[around.input[0]]
        if around.name not in scopes and around.op_type == "DequantizeLinear":
            around = readers[around.output[0]]
        found[node.name] = scopes.get(around.name, "")
    return found


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The quantizer prints, and logs to the root logger, which it would give a handler for good."""
    root, handler, drop = logging.getLogger(), logging.NullHandler(), logging.Filter("nobody")
    root.addHandler(handler)
    root.addFilter(drop)
    try:
        with quiet(), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.removeFilter(drop)
        root.removeHandler(handler)
