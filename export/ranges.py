"""A float ONNX graph as quantization sees it: its layers, names that no exporter gave, the ranges of its tensors.

The search for the range that loses least information is ONNX Runtime's (Migacz 2017, "8-bit inference with TensorRT").
The histograms are not: its own grow without end when a first image is dark, and differ with the size of a batch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import numpy_helper
from torch import Tensor

from slim.errors import MissingExtra, SlimError, StoreError, UsageError, did_you_mean
from slim.export.onnx import OnnxFile, reason
from slim.export.target import Target
from slim.quantization import METHODS

LAYERS = ("Conv", "Gemm", "MatMul")

FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}

BINS = 4096
"""Of a histogram, half of them below zero."""
ENTROPY_BINS = 1024
"""The search takes 0.15 s for a tensor, four times that at twice as many; ONNX Runtime's own 128 leave no choice."""
LEVELS = 128
"""Of the INT8 distribution the search compares with."""
SMALLEST, LARGEST = 2.0**-60, 2.0**100
"""Reach of the first histogram; what is not finite in INT8's sense."""


def ranges(
    file: OnnxFile, batches: Iterable[Tensor], method: str, target: Target, threads: int
) -> dict[str, tuple[float, float]]:
    """Key -> (low, high) of every float tensor of `file`, over all `batches` (B, C, H, W) float32, in one pass.

    `target` is named in errors. A tensor that is not finite has no range. Memory is that of one image's activations,
    and the size of a batch changes nothing.

    Raises:
        UsageError: no images, images of another size, or an unknown method.
        SlimError: ONNX Runtime cannot run the file.
        MissingExtra: ONNX Runtime is not installed.
    """
    if method not in METHODS:
        raise UsageError(f"quantize: unknown method {method!r}{did_you_mean(method, METHODS)}")
    need_onnxruntime(f"target {target}")
    proto = load(file.path)
    keys = tensor_keys(proto.graph, file.scopes)
    source = file.inputs[0]
    made = [name for name in keys if name != source.name]
    session = _session(proto, made, threads, place=file.path)
    seen: dict[str, _Seen] = {}
    for batch in batches:
        if batch.shape[1:] != source.shape[1:]:
            raise UsageError(
                f"quantize: {file.path} takes images {source.shape[1:]}, these are {tuple(batch.shape[1:])}; "
                "give images of that size"
            )
        for image in torch.split(batch, 1):
            values = image.numpy()
            try:
                outputs = session.run(made, {source.name: values})
            except Exception as error:  # the runtime's own exceptions share no base class
                raise SlimError(f"{file.path}: ONNX Runtime cannot run it: {reason(error)}; export it again") from error
            for name, array in zip([source.name, *made], [values, *outputs], strict=True):
                if array.dtype == np.float32 and array.size:
                    seen.setdefault(name, _Seen(counted=method != "minmax")).add(array)
    if not seen:
        raise UsageError("quantize: no images to find ranges on; give at least one")
    return {keys[name]: found.range(method) for name, found in seen.items() if found.is_finite}


class _Seen:
    """What was seen of one tensor.

    The histogram reaches from -`reach` to `reach`, a power of two. To reach twice as far, pairs of bins are merged: the
    counts are those of one histogram over everything, in whatever pieces it came.
    """

    def __init__(self, *, counted: bool) -> None:
        self.low, self.high = math.inf, -math.inf
        self.is_finite = True
        self.reach = SMALLEST
        self.counts = np.zeros(BINS, np.int64) if counted else None

    def add(self, values: np.ndarray[Any, Any]) -> None:
        low, high = float(values.min()), float(values.max())
        self.is_finite = self.is_finite and max(-low, high) < LARGEST  # a NaN is not less than anything
        if not self.is_finite:
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.counts is None:
            return
        while self.reach <= max(-low, high):
            self.reach *= 2
            self.counts = np.pad(self.counts.reshape(-1, 2).sum(1), BINS // 4)
        self.counts += np.histogram(values, BINS, (-self.reach, self.reach))[0]

    def range(self, method: str) -> tuple[float, float]:
        """Lowest and highest value to be told apart; never beyond those that were seen."""
        if self.counts is None:
            return self.low, self.high
        kept = method.partition("percentile-")[2]
        low, high = self._percentile(float(kept)) if kept else self._entropy()
        low, high = max(low, self.low), min(high, self.high)
        # Where all values are far from zero, a range around zero can miss them all.
        return (low, high) if low <= high else (self.low, self.high)

    def _percentile(self, kept: float) -> tuple[float, float]:
        """The outer edges of the bins where at most half of what may go is cut off on either side."""
        assert self.counts is not None, "counted by every method but minmax"
        cut = (100 - kept) / 200
        share = np.cumsum(self.counts) / self.counts.sum()
        edges = np.linspace(-self.reach, self.reach, BINS + 1)
        left, right = np.searchsorted(share, cut, side="right"), np.searchsorted(share, 1 - cut)
        return float(edges[left]), float(edges[right + 1])

    def _entropy(self) -> tuple[float, float]:
        from onnxruntime.quantization.calibrate import HistogramCollector

        assert self.counts is not None, "counted by every method but minmax"
        counts = self.counts.reshape(ENTROPY_BINS, -1).sum(1)
        edges = np.linspace(-self.reach, self.reach, ENTROPY_BINS + 1, dtype=np.float32)
        bounds = np.float32(self.low), np.float32(self.high)
        search = HistogramCollector("entropy", False, ENTROPY_BINS, LEVELS, None, None)
        low, high = search.get_entropy_threshold((counts, edges, *bounds), LEVELS)
        return float(low), float(high)


def _session(proto: onnx.ModelProto, made: Iterable[str], threads: int, *, place: Path) -> Any:
    """A session that returns every tensor named in `made`, of the graph as it was exported."""
    import onnxruntime

    given = {port.name for port in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made if name not in given)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own exceptions share no base class
        raise StoreError(f"{place}: ONNX Runtime cannot load it: {reason(error)}; export it again") from error


def layers(file: OnnxFile) -> tuple[str, ...]:
    """Keys of the nodes that can be INT8, in graph order: Conv, Gemm and MatMul with a constant weight."""
    graph = load(file.path).graph
    keys = node_keys(graph, file.scopes)
    return tuple(keys[node.name] for node in layer_nodes(graph))


def structure(file: OnnxFile) -> str:
    """sha256 of the graph without weights and names: operators, attributes, edges, shapes, axes and target shapes."""
    graph = load(file.path).graph
    described: dict[str, Any] = {value.name: _constant(value) for value in graph.initializer}
    for number, port in enumerate(graph.input):
        described[port.name] = [number, [dim.dim_value for dim in port.type.tensor_type.shape.dim]]
    lines: list[Any] = []
    for node in graph.node:
        attributes = sorted([entry.name, _attribute(entry)] for entry in node.attribute)
        lines.append([node.domain, node.op_type, attributes, [described.get(name) for name in node.input]])
        described |= {name: [len(lines), index] for index, name in enumerate(node.output)}
    lines.append([described[port.name] for port in graph.output])
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def node_keys(graph: onnx.GraphProto, scopes: dict[str, str]) -> dict[str, str]:
    """Node name -> key, as in slim/quantization.py."""
    counts: Counter[str] = Counter()
    keys = {}
    for node in graph.node:
        place = f"{scopes.get(node.name, '')}/{node.op_type}"
        keys[node.name] = f"{place}/{counts[place]}"
        counts[place] += 1
    return keys


def tensor_keys(graph: onnx.GraphProto, scopes: dict[str, str]) -> dict[str, str]:
    """Tensor name -> key, for the input and every output of a node."""
    keys = node_keys(graph, scopes)
    tensors = {port.name: "image" for port in graph.input}
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name:
                tensors[name] = f"{keys[node.name]}:{index}" if index else keys[node.name]
    return tensors


def load(path: Path) -> onnx.ModelProto:
    """The file at `path`. Raises StoreError when it is not a whole ONNX file."""
    try:
        return onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise StoreError(f"{path}: not a whole ONNX file ({error}); export it again") from error


def need_onnxruntime(place: str) -> None:
    """Raise MissingExtra, naming `place`, where ONNX Runtime is not installed."""
    if util.find_spec("onnxruntime") is None:
        raise MissingExtra(f"{place}: INT8 is made with onnxruntime, which is not installed; pip install 'slim[cpu]'")


def layer_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that can be INT8."""
    shapes = {value.name: value.dims for value in graph.initializer if value.data_type in FLOATS}
    found = [node for node in graph.node if node.op_type in LAYERS and node.input[1] in shapes]
    return [
        node
        for node in found
        # Weights for each image of a batch have no output channels to scale; a factor of the bias would get lost.
        if not (node.op_type == "MatMul" and len(shapes[node.input[1]]) != 2)
        and not any(entry.name == "beta" and entry.f != 1 for entry in node.attribute)
    ]


def _constant(value: onnx.TensorProto) -> list[Any]:
    """Shape and type; of whole numbers the values too, which are axes, indices and shapes."""
    values = [] if value.data_type in FLOATS else numpy_helper.to_array(value).tolist()
    return [value.data_type, list(value.dims), values]


def _attribute(entry: onnx.AttributeProto) -> Any:
    return _constant(entry.t) if entry.HasField("t") else entry.SerializeToString(deterministic=True).hex()
