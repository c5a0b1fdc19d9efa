"""Rules of TensorRT 10 and 11 and of TensorRT-RTX, whose parser and builder were asked about each of them.

That was TensorRT-RTX 1.7.1; a test compares its table of operators with what is installed. TensorRT itself was not
asked: where its documentation says otherwise, or more, the rule tells.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import NodeProto, TensorProto

from slim.export.lint_graph import Graph, Problem, attribute, error, is_onnx, operand, rule, type_name, warning
from slim.export.lint_rules import dropout, mixed_types, resize_grid

# fmt: off
TENSORRT_LACKS = frozenset({
    "AffineGrid", "Bernoulli", "BitCast", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor",
    "CenterCropPad", "Col2Im", "Compress", "ConcatFromSequence", "ConvInteger", "CumProd", "DFT", "DeformConv", "Det",
    "DynamicQuantizeLinear", "ImageDecoder", "MatMulInteger", "MaxRoiPool", "MaxUnpool", "MelWeightMatrix",
    "Multinomial", "NegativeLogLikelihoodLoss", "Optional", "OptionalGetElement", "OptionalHasElement", "QLinearConv",
    "QLinearMatMul", "RegexFullMatch", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase",
    "SequenceInsert", "SequenceLength", "SequenceMap", "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat",
    "StringNormalizer", "StringSplit", "SwiGLU", "TfIdfVectorizer", "Unique",
})
"""ONNX operators that the parser of TensorRT-RTX does not know."""

TENSORRT_ADDS = frozenset({
    "GroupQueryAttention", "MatMulNBits", "MultiHeadAttention", "QMoE", "SkipSimplifiedLayerNormalization",
})
"""Operators of com.microsoft, and not of ONNX, that it knows."""
# fmt: on

OPSETS = (9, 25)
"""Opsets that TensorRT 11 documents. TensorRT-RTX was seen to take 6 to 30."""

QUANTISED = ("QuantizeLinear", "DequantizeLinear")
QUANTISED_TYPES = (TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1)
TENSORRT_TYPES = (
    *QUANTISED_TYPES,
    *(TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16),
    *(TensorProto.BOOL, TensorProto.UINT8, TensorProto.INT32, TensorProto.INT64),
)

QDQ = "quantise with QuantizeLinear and DequantizeLinear around float operators"
S8 = "quantise symmetrically to int8, as slim's form s8 does"


@rule("operator", "Every operator is one that TensorRT's parser knows.")
def tensorrt_operator(graph: Graph) -> Iterator[Problem]:
    """DeformConv is a plugin of TensorRT, which TensorRT-RTX does not come with: the only difference documented."""
    for node in filter(is_onnx, graph.nodes):
        if node.op_type == "DeformConv":
            yield warning(node, "DeformConv is TensorRT's only, TensorRT-RTX lacks it", "serve it with TensorRT")
        elif not _is_known(node):
            integer = node.op_type.startswith(("QLinear", "DynamicQuantize")) or node.op_type.endswith("Integer")
            yield error(node, f"TensorRT has no {node.op_type}", QDQ if integer else "write it with other operators")


@rule("custom-domain", "No operator comes from outside ONNX.")
def tensorrt_domain(graph: Graph) -> Iterator[Problem]:
    """The parser looks at the name, not at the domain: it takes com.microsoft.Gelu for ONNX's Gelu."""
    for node in graph.nodes:
        full = f"{node.domain}.{node.op_type}"
        if not is_onnx(node) and _is_known(node):
            yield warning(node, f"{full} is read as {node.op_type} of any domain", "export without it")
        elif not is_onnx(node):
            yield error(node, f"TensorRT has no {full}", "export without ONNX Runtime's fusions and plugins")


@rule("opset", f"The opset is {OPSETS[0]} to {OPSETS[1]}, which TensorRT 11 documents.")
def tensorrt_opset(graph: Graph) -> Iterator[Problem]:
    """Never an error: the parser reads other opsets as well, and refuses only operators."""
    if not OPSETS[0] <= graph.opset <= OPSETS[1]:
        fix = f"export with opset {OPSETS[0]} to {OPSETS[1]}"
        yield warning("opset_import", f"opset {graph.opset} is not documented for TensorRT 11", fix)


@rule("tensor-type", "Tensors have types that TensorRT has; uint8 is for inputs, outputs and constants.")
def tensorrt_types(graph: Graph) -> Iterator[Problem]:
    """int16 and uint16 among those it has not."""
    strange: dict[int, list[str]] = {}
    for name, data_type in graph.types.items():
        if data_type not in TENSORRT_TYPES:
            strange.setdefault(data_type, []).append(name)
    for data_type, (name, *others) in strange.items():
        more = f", as are {len(others)} more" if others else ""
        yield error(name, f"is {type_name(data_type)}, which TensorRT has not{more}", "use int8, int32, int64 or float")
    for node in graph.nodes:
        for name in node.output:
            inner = name not in graph.outputs and node.op_type not in (*QUANTISED, "Constant")
            if inner and graph.types.get(name) == TensorProto.UINT8:
                yield error(node, f"{name!r} inside the graph is uint8", "cast to int32 or float")


@rule("mixed-types", "Inputs that ONNX wants of one type are of one type.")
def tensorrt_mixed(graph: Graph) -> Iterator[Problem]:
    """TensorRT reads double as float, and casts by itself in three operators that ONNX Runtime would refuse."""
    for node, what in mixed_types(graph, same={TensorProto.DOUBLE: TensorProto.FLOAT}):
        kind = warning if node.op_type in ("BatchNormalization", "Clip", "Pad") else error
        yield kind(node, what, "convert the whole network to one type: model.half() before the export")


@rule("zero-point", "Every zero point is a constant 0.")
def zero_point(graph: Graph) -> Iterator[Problem]:
    """TensorRT quantises symmetrically."""
    for node in graph.of(*QUANTISED):
        name = operand(node, 2)
        value = graph.value(name)
        if name and graph.constant(name) is None:
            yield error(node, f"zero point {name!r} is computed", "make it a constant 0")
        elif value is not None and (shift := value.astype(float)).any():
            yield error(node, f"zero point {name!r} holds {shift[shift != 0][0]:g}, not 0", S8)


@rule("quantised-type", "Quantised values are int8, int4, float8e4m3fn or float4e2m1.")
def quantised_type(graph: Graph) -> Iterator[Problem]:
    """uint8 with zero point 0, ONNX's default, is the worst: it builds, as int8, and clips at 127 instead of 255."""
    for node in graph.of(*QUANTISED):
        made = node.op_type == "QuantizeLinear"
        source = graph.producers.get(node.input[0])
        if not made and source is not None and source.op_type != "Constant":
            continue  # what made the values is to blame
        name = node.output[0] if made else node.input[0]
        found = graph.types.get(name) or graph.types.get(operand(node, 2))
        if found == TensorProto.UINT8:
            yield error(node, "quantises to uint8, which is read as int8 or refused", f"{S8}, zero point given")


@rule("scale", "Every scale is above 0.")
def scale(graph: Graph) -> Iterator[Problem]:
    """A channel of zeros gets scale 0 from some quantisers."""
    for node in graph.of(*QUANTISED):
        value = graph.value(operand(node, 1))
        if value is not None and not (value.astype(float) > 0).all():
            fix = "give channels of zeros any positive scale"
            yield error(node, f"scale {node.input[1]!r} holds {value.astype(float).min():g}", fix)


@rule("int32-bias", "No DequantizeLinear reads int32.")
def int32_bias(graph: Graph) -> Iterator[Problem]:
    """ONNX Runtime quantises biases so by default."""
    for node in graph.of("DequantizeLinear"):
        if graph.types.get(node.input[0]) == TensorProto.INT32:
            yield error(node, f"{node.input[0]!r} is int32", "leave biases in float: QuantizeBias=False")


@rule("quantised-constant", "A quantised constant goes into DequantizeLinear and nowhere else.")
def quantised_constant(graph: Graph) -> Iterator[Problem]:
    """Not even a Reshape may stand between."""
    for name, tensor in graph.constants.items():
        if tensor.data_type not in QUANTISED_TYPES:
            continue
        for node, index in graph.consumers[name]:
            as_data = node.op_type == "DequantizeLinear" and index == 0
            if not as_data and not (node.op_type in QUANTISED and index == 2):
                what = f"takes the {type_name(tensor.data_type)} constant {name!r}"
                yield error(node, what, "do it to the float values, or after DequantizeLinear")


@rule("fused-activation", "Nothing is quantised between Conv and its activation.")
def fused_activation(graph: Graph) -> Iterator[Problem]:
    """NVIDIA's advice: the two are one kernel, and a quantisation between them costs accuracy and time."""
    for node in graph.of("QuantizeLinear"):
        maker = graph.producers.get(node.input[0])
        if maker is None or maker.op_type != "Conv":
            continue
        dequantised = [reader.output[0] for reader, _ in graph.consumers[node.output[0]] if reader.output]
        readers = {reader.op_type for name in dequantised for reader, _ in graph.consumers[name]}
        for activation in sorted(readers & {"Relu", "Clip"}):
            what = f"quantises between Conv and {activation}, which are then not fused"
            yield warning(node, what, "quantise the inputs of Conv only, or after the activation")


@rule("attention-fp32", "Attention computes in float16 or bfloat16.")
def attention_fp32(graph: Graph) -> Iterator[Problem]:
    """The operator of opset 23 has no float32 kernel, for no head size and no GPU tried (SM80, SM86, SM89, SM120)."""
    for node in graph.of("Attention"):
        if graph.types.get(node.input[0]) in (TensorProto.FLOAT, TensorProto.DOUBLE):
            fix = "export with opset 22 or older, where attention is MatMul and Softmax, or in float16"
            yield error(node, "Attention in float32 has no kernel", fix)


@rule("pool-dilation", "Pooling is not dilated.")
def pool_dilation(graph: Graph) -> Iterator[Problem]:
    """Dilations must be absent or 1."""
    for node in graph.of("MaxPool", "AveragePool", "LpPool"):
        dilations = attribute(node, "dilations", [])
        if any(step != 1 for step in dilations):
            yield error(node, f"{node.op_type} has dilations {list(dilations)}", "pool without dilation")


@rule("extra-output", "MaxPool, LayerNormalization and BatchNormalization give their first output only.")
def extra_output(graph: Graph) -> Iterator[Problem]:
    """Even one that nobody takes is refused."""
    for node in graph.of("MaxPool", "LayerNormalization", "BatchNormalization"):
        extra = [name for name in node.output[1:] if name]
        if extra:
            yield error(node, f"{node.op_type} also gives {', '.join(extra)}", "drop the outputs after the first")


@rule("resize", "Resize stretches, without antialiasing, on one of five grids.")
def tensorrt_resize(graph: Graph) -> Iterator[Problem]:
    """Cubic is accepted, though TensorRT's list of operators has only nearest and linear."""
    for node in graph.of("Resize"):
        yield from resize_grid(node)
        if attribute(node, "antialias", 0):
            yield error(node, "Resize has antialias", "resize without it: antialias=False in torch")
        policy = attribute(node, "keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            yield error(node, f"Resize keeps the aspect ratio: {policy}", "give the size in pixels and stretch")


@rule("reduce-axes", "The axes of a reduction are constant.")
def reduce_axes(graph: Graph) -> Iterator[Problem]:
    """Axes are an input since opset 18, of ReduceSum since 13."""
    for node in graph.nodes:
        name = operand(node, 1) if node.op_type.startswith("Reduce") else ""
        if name and graph.constant(name) is None:
            yield error(node, f"axes {name!r} of {node.op_type} are computed", "give the dimensions as numbers")


@rule("training", "Dropout and BatchNormalization are in inference mode.")
def tensorrt_training(graph: Graph) -> Iterator[Problem]:
    """A mode that is computed is refused as well."""
    yield from dropout(graph)
    for node in graph.of("BatchNormalization"):
        if attribute(node, "training_mode", 0):
            yield error(node, "BatchNormalization is in training mode", "export after model.eval()")


@rule("scatter-reduction", "ScatterND and ScatterElements write, they do not add up.")
def scatter_reduction(graph: Graph) -> Iterator[Problem]:
    """`reduction` must be none."""
    for node in graph.of("ScatterND", "ScatterElements"):
        reduction = attribute(node, "reduction", "none")
        if reduction != "none":
            yield error(node, f"{node.op_type} has reduction {reduction!r}", "add up with MatMul or ReduceSum")


def _is_known(node: NodeProto) -> bool:
    """Whether the parser knows an operator of that name."""
    return node.op_type in TENSORRT_ADDS or (onnx.defs.has(node.op_type) and node.op_type not in TENSORRT_LACKS)
