"""Rules of OpenVINO and of ONNX Runtime, each found by asking it, and what they share with TensorRT's.

The tables are read from OpenVINO 2026.4.1 and ONNX Runtime 1.31.1; a test compares them with what is installed.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import NodeProto, TensorProto

from slim.errors import MissingExtra
from slim.export.lint_graph import Graph, Problem, attribute, error, is_onnx, missing, operand, rule, type_name, warning

# fmt: off
OPENVINO_LACKS = frozenset({
    "BitCast", "CausalConvWithState", "CumProd", "DeformConv", "Det", "ImageDecoder", "LinearAttention", "MaxUnpool",
    "MelWeightMatrix", "Optional", "OptionalGetElement", "OptionalHasElement", "RegexFullMatch", "SequenceMap",
    "StringConcat", "StringNormalizer", "StringSplit", "SwiGLU", "TensorScatter", "TfIdfVectorizer",
})
"""ONNX operators that OpenVINO has no conversion for. Those of sequences it converts in some company, and not alone."""

OPENVINO_ADDS = frozenset({
    "Attention", "BiasAdd", "BiasGelu", "BifurcationDetector", "DequantizeLinear", "DynamicQuantizeLSTM",
    "DynamicQuantizeMatMul", "EmbedLayerNormalization", "FastGelu", "FusedConv", "FusedGemm", "FusedMatMul",
    "GatherBlockQuantized", "GatherND", "Gelu", "GroupNorm", "GroupQueryAttention", "MatMulIntegerToFloat",
    "MatMulNBits", "MultiHeadAttention", "Pad", "QLinearAdd", "QLinearAveragePool", "QLinearConcat",
    "QLinearLeakyRelu", "QLinearMul", "QLinearReduceMean", "QLinearSigmoid", "QLinearSoftmax", "QLinearWhere",
    "QuantizeLinear", "QuickGelu", "Range", "RotaryEmbedding", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization", "Trilu",
})
"""Operators of com.microsoft that it has a conversion for."""

ORT_LACKS_BFLOAT16 = frozenset({
    "Add", "BatchNormalization", "Conv", "ConvTranspose", "Gelu", "Gemm", "GlobalAveragePool", "HardSwish", "MatMul",
    "MaxPool", "Mul", "ReduceMean", "Relu", "Resize", "Sigmoid", "Softmax",
})
"""Operators without a bfloat16 kernel in ONNX Runtime's CPU provider."""
# fmt: on

GRIDS = ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners")
"""How Resize may place pixels, in TensorRT as in OpenVINO."""


@rule("resize", "Resize uses one of five grids.")
def openvino_resize(graph: Graph) -> Iterator[Problem]:
    """What else TensorRT refuses of Resize, OpenVINO takes."""
    for node in graph.of("Resize"):
        yield from resize_grid(node)


@rule("training", "Dropout is in inference mode.")
def openvino_training(graph: Graph) -> Iterator[Problem]:
    """A mode that is computed is refused as well."""
    yield from dropout(graph)


@rule("mixed-types", "Inputs that ONNX wants of one type are of one type.")
def openvino_mixed(graph: Graph) -> Iterator[Problem]:
    """No exceptions here."""
    for node, what in mixed_types(graph, same={}):
        yield error(node, what, "convert the whole network to one type: model.half() before the export")


@rule("external-data", "Values outside the file lie whole in its folder.")
def external_data(graph: Graph) -> Iterator[Problem]:
    """The usual case: the .onnx was moved or renamed, the .data was not."""
    told = set()
    for tensor in graph.constants.values():
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        why = missing(tensor, graph.folder) if graph.folder else "is in no folder that was given"
        if why and location not in told:
            told.add(location)
            what = f"values of {tensor.name!r} lie in a second file, which {why}"
            yield error(location, what, "move both files together, or export into one file")


@rule("operator", "Every operator is one that OpenVINO converts.")
def openvino_operator(graph: Graph) -> Iterator[Problem]:
    """It knows some operators of com.microsoft, and its own domain's."""
    for node in graph.nodes:
        if is_onnx(node):
            refused = node.op_type in OPENVINO_LACKS or not onnx.defs.has(node.op_type)
        elif node.domain == "com.microsoft":
            refused = node.op_type not in OPENVINO_ADDS
        else:
            refused = node.domain != "org.openvinotoolkit"
        if refused:
            full = node.op_type if is_onnx(node) else f"{node.domain}.{node.op_type}"
            yield error(node, f"OpenVINO has no {full}", "write it with other operators")


@rule("functions", "The graph calls no functions of its own.")
def openvino_functions(graph: Graph) -> Iterator[Problem]:
    """OpenVINO does not look into them."""
    called = {f"{node.domain}.{node.op_type}" for node in graph.model.graph.node}
    for full in sorted(called & {f"{function.domain}.{function.name}" for function in graph.model.functions}):
        yield error(full, f"OpenVINO does not convert functions such as {full}", "inline them: onnx.inliner")


@rule("version", "The installed ONNX Runtime takes the file's opset and IR version.")
def ort_version(graph: Graph) -> Iterator[Problem]:
    """Asked of the runtime itself. Raises MissingExtra without it."""
    try:
        import onnxruntime
    except ImportError as cause:
        raise MissingExtra("lint: onnxruntime is not installed; pip install 'slim[cpu]'") from cause
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # the error comes back as exception; printed as well it would be said twice
    empty = onnx.parser.parse_graph("g (float[1] x) => (float[1] y) { y = Identity(x) }")
    version, opset = graph.model.ir_version, onnx.helper.make_opsetid("", graph.opset)
    probe = onnx.helper.make_model(empty, opset_imports=[opset], ir_version=version)
    try:
        onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # the runtime's own exceptions share no base class
        what = f"opset {graph.opset} or IR version {version} is too new for ONNX Runtime {onnxruntime.__version__}"
        yield error("opset_import", what, "export with an older opset, or update onnxruntime")


@rule("bfloat16", "No operator without a bfloat16 kernel computes in bfloat16.")
def ort_bfloat16(graph: Graph) -> Iterator[Problem]:
    """ONNX Runtime's CPU provider has hardly any."""
    for node in graph.of(*ORT_LACKS_BFLOAT16):
        if graph.types.get(node.input[0]) == TensorProto.BFLOAT16:
            fix = "serve float32, or this network elsewhere"
            yield error(node, f"ONNX Runtime has no {node.op_type} in bfloat16 on the CPU", fix)


@rule("integer-kernels", "What is quantised can be computed in integers.")
def ort_integers(graph: Graph) -> Iterator[Problem]:
    """A Conv becomes an integer one only where its output is quantised too; ReLU between is absorbed by uint8 only.

    The rest is dequantised, then computed in float: 1.5 times the time of a ResNet-18 that was never quantised.
    """
    slow = [node for node in graph.of("Conv") if _dequantised(graph, node) and not _requantised(graph, node)]
    if slow:
        what = f"{len(slow)} quantised Conv are computed in float, slower than if not quantised"
        yield warning(slow[0], what, "quantise outputs too, to uint8: slim's form u8")


def resize_grid(node: NodeProto) -> Iterator[Problem]:
    """A Resize that places pixels as neither TensorRT nor OpenVINO can."""
    grid = attribute(node, "coordinate_transformation_mode", "half_pixel")
    if grid not in GRIDS:
        yield error(node, f"Resize uses the grid {grid}", f"use one of {', '.join(GRIDS)}")


def dropout(graph: Graph) -> Iterator[Problem]:
    """Every Dropout that is in training mode, or may be."""
    for node in graph.of("Dropout"):
        name = operand(node, 2)
        if name and graph.constant(name) is None:
            yield error(node, f"training_mode {name!r} of Dropout is computed", "export after model.eval()")
        elif name and (value := graph.value(name)) is not None and value.any():
            yield error(node, "Dropout is in training mode", "export after model.eval()")


def mixed_types(graph: Graph, same: dict[int, int]) -> Iterator[tuple[NodeProto, str]]:
    """Nodes with inputs of several types where the operator's schema has one type variable for all of them."""
    for node in filter(is_onnx, graph.nodes):
        if not onnx.defs.has(node.op_type, graph.opset):
            continue
        schema = onnx.defs.get_schema(node.op_type, graph.opset)
        variables = {constraint.type_param_str for constraint in schema.type_constraints}
        found: dict[str, dict[int, str]] = {}
        for index, name in enumerate(node.input):
            formal = schema.inputs[min(index, len(schema.inputs) - 1)]
            data_type = graph.types.get(name)
            if data_type and formal.type_str in variables and formal.is_homogeneous:
                found.setdefault(formal.type_str, {}).setdefault(same.get(data_type, data_type), name)
        for types in found.values():
            if len(types) > 1:
                shown = ", ".join(f"{name!r} {type_name(data_type)}" for data_type, name in types.items())
                yield node, f"{node.op_type} takes one type, and gets {shown}"


def _dequantised(graph: Graph, node: NodeProto) -> bool:
    """Whether its image comes out of DequantizeLinear, and is no constant."""
    maker = graph.producers.get(node.input[0])
    return maker is not None and maker.op_type == "DequantizeLinear" and graph.constant(maker.input[0]) is None


def _requantised(graph: Graph, node: NodeProto) -> bool:
    """Whether its output is quantised: at once, or to uint8 behind an activation."""
    name, types = node.output[0], {TensorProto.INT8, TensorProto.UINT8}
    readers = graph.consumers[name]
    if len(readers) == 1 and readers[0][0].op_type in ("Relu", "Clip"):
        name, types = readers[0][0].output[0], {TensorProto.UINT8}
    quantised = [
        reader.op_type == "QuantizeLinear" and graph.types.get(reader.output[0]) in types
        for reader, _ in graph.consumers[name]
    ]
    return len(quantised) > 0 and all(quantised)
