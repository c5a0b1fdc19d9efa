"""What rules look at, an ONNX graph with an index; and what they are made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper, inliner, numpy_helper, shape_inference

SMALL = 1024
"""Elements up to which a constant may hold a shape; larger ones are weights, which shapes do not depend on."""

FOLDED = ("Identity", "Cast")
"""Operators behind which the parsers still see a constant."""

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """A place where a graph breaks a rule. As text it is one line."""

    rule: str
    severity: Severity
    """`error`: the runtime refuses the graph, or computes something else. `warning`: it may, or is slow."""
    node: str
    """Name of the node, or of its first output where it has none; of the tensor or file where no node is to blame."""
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.rule}: {self.node!r}: {self.what}; {self.fix}"


Problem = tuple[Severity, str, str, str]
"""A finding before it has the name of its rule."""


@dataclass(frozen=True)
class Rule:
    """What a graph must keep to be served by a runtime."""

    name: str
    about: str
    """One line."""
    check: Callable[[Graph], Iterator[Finding]]


def rule(name: str, about: str) -> Callable[[Callable[[Graph], Iterator[Problem]]], Rule]:
    """Make a rule of a function that yields the problems of a graph."""

    def make(problems: Callable[[Graph], Iterator[Problem]]) -> Rule:
        return Rule(name, about, lambda graph: (Finding(name, *problem) for problem in problems(graph)))

    return make


def error(node: NodeProto | str, what: str, fix: str) -> Problem:
    """What the runtime refuses, or reads as something else."""
    return "error", _label(node), what, fix


def warning(node: NodeProto | str, what: str, fix: str) -> Problem:
    """What may fail elsewhere, or costs time."""
    return "warning", _label(node), what, fix


class Graph:
    """The nodes of a model, those of its functions and subgraphs too, and who makes and takes each tensor."""

    def __init__(self, model: onnx.ModelProto, folder: Path | None = None) -> None:
        """Index `model`, which is not changed; values outside of it lie in `folder`.

        Raises:
            onnx.shape_inference.InferenceError, RuntimeError: ONNX itself cannot make sense of it.
        """
        self.model = model
        self.folder = folder
        self.nodes: list[NodeProto] = []
        self.producers: dict[str, NodeProto] = {}
        self.consumers: dict[str, list[tuple[NodeProto, int]]] = defaultdict(list)
        """Tensor -> nodes that take it, and as which input."""
        self.constants: dict[str, TensorProto] = {}
        self.types: dict[str, int] = {}
        """Tensor -> TensorProto.DataType, where it can be inferred."""
        whole = self._skeleton(model)
        if model.functions:
            whole = inliner.inline_local_functions(whole)
        whole = shape_inference.infer_shapes(whole)
        self.opset = next((entry.version for entry in whole.opset_import if entry.domain in ("", "ai.onnx")), 1)
        self.outputs = {value.name for value in whole.graph.output}
        self._add(whole.graph)
        self.constants |= {tensor.name: tensor for tensor in model.graph.initializer}  # these have their values

    def of(self, *operators: str) -> Iterator[NodeProto]:
        """Nodes of these operators, whatever their domain: TensorRT's parser goes by the name alone."""
        return (node for node in self.nodes if node.op_type in operators)

    def constant(self, name: str) -> TensorProto | None:
        """The constant that `name` is, if it is one."""
        while name in self.producers and self.producers[name].op_type in FOLDED:
            name = self.producers[name].input[0]
        return self.constants.get(name)

    def value(self, name: str) -> np.ndarray[Any, Any] | None:
        """The value of a constant; None for other tensors, and where the file that holds it is not there."""
        tensor = self.constant(name)
        if tensor is None:
            return None
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        if self.folder is None or missing(tensor, self.folder):
            return None
        return numpy_helper.to_array(tensor, str(self.folder))

    def _skeleton(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """`model` without its weights: inference copies what it is given, and reads no value from another file."""
        graph = model.graph
        tensors = []
        for tensor in graph.initializer:
            self.constants[tensor.name] = tensor
            small = int(np.prod(tensor.dims)) <= SMALL
            if small and tensor.data_location != TensorProto.EXTERNAL:
                tensors.append(tensor)
            elif small and (value := self.value(tensor.name)) is not None:
                tensors.append(numpy_helper.from_array(value, tensor.name))
            else:
                tensors.append(TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims))
        bare = helper.make_graph(
            graph.node, graph.name or "graph", graph.input, graph.output, tensors, value_info=graph.value_info
        )
        return helper.make_model(
            bare, opset_imports=model.opset_import, functions=model.functions, ir_version=model.ir_version
        )

    def _add(self, graph: onnx.GraphProto) -> None:
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type:
                self.types[value.name] = value.type.tensor_type.elem_type
        for tensor in graph.initializer:
            self._add_constant(tensor.name, tensor)
        for node in graph.node:
            self.nodes.append(node)
            self.producers |= dict.fromkeys(filter(None, node.output), node)
            for index, name in enumerate(node.input):
                self.consumers[name].append((node, index))
            for attribute in node.attribute:
                if node.op_type == "Constant" and (tensor := _tensor(attribute)) is not None:
                    self._add_constant(node.output[0], tensor)
                for inner in (attribute.g, *attribute.graphs) if attribute.type in _GRAPHS else ():
                    self._add(inner)

    def _add_constant(self, name: str, tensor: TensorProto) -> None:
        self.constants[name] = tensor
        self.types[name] = tensor.data_type


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """Value of an attribute; strings as `str`."""
    for entry in node.attribute:
        if entry.name == name:
            value = helper.get_attribute_value(entry)
            return value.decode() if isinstance(value, bytes) else value
    return default


def operand(node: NodeProto, index: int) -> str:
    """Name of an input; empty where it is left out."""
    return node.input[index] if index < len(node.input) else ""


def is_onnx(node: NodeProto) -> bool:
    """Whether its operator is one of ONNX, and not of another domain."""
    return node.domain in ("", "ai.onnx")


def type_name(data_type: int) -> str:
    """`uint8` of TensorProto.UINT8."""
    return str(TensorProto.DataType.Name(data_type)).lower()


def missing(tensor: TensorProto, folder: Path) -> str:
    """Why the values of `tensor`, which lie in a file of `folder`, cannot be read; empty when they can."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    path = folder / location
    if not path.resolve().is_relative_to(folder.resolve()) or not location:
        return f"{location!r} is not a file of the folder"
    if not path.is_file():
        return "is not there"
    end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
    if (size := path.stat().st_size) < end:
        return f"has {size} bytes, {end} are needed"
    return ""


_GRAPHS = (AttributeProto.GRAPH, AttributeProto.GRAPHS)


def _label(node: NodeProto | str) -> str:
    if isinstance(node, str):
        return node
    return node.name or next(iter(node.output), node.op_type)


def _tensor(attribute: AttributeProto) -> TensorProto | None:
    if attribute.name == "value":
        return attribute.t
    types = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    if attribute.name not in types:
        return None
    return numpy_helper.from_array(np.asarray(helper.get_attribute_value(attribute), types[attribute.name]))
