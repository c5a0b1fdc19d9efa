"""Tiny graphs that break one rule of TensorRT each, and twins that differ in that one thing and break none.

Every graph is shown to the lint and to the parser and builder of TensorRT-RTX, so that neither drifts from the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx.parser
from onnx import ModelProto, TensorProto, numpy_helper

IMAGE = "(float[batch,3,16,16] x) => (float[] y)"
HALF_IMAGE = "(float16[batch,3,16,16] x) => (float16[] y)"
BRAIN_IMAGE = "(bfloat16[batch,3,16,16] x) => (bfloat16[] y)"
ROWS = "(float[batch,16] x) => (float[] y)"
COLUMNS = "(float[batch,27,196] x) => (float[] y)"

WEIGHT = np.random.default_rng(0).normal(size=(8, 3, 3, 3)).astype(np.float32)
BIAS = np.linspace(-1, 1, 8, dtype=np.float32)
HALF = WEIGHT.astype(np.float16), BIAS.astype(np.float16)
BRAIN = WEIGHT.astype(ml_dtypes.bfloat16), BIAS.astype(ml_dtypes.bfloat16)
SCALE = np.float32(0.05)
ZERO = np.float32(0)
SCALES = np.full(8, 0.01, np.float32)
INT8_WEIGHT = np.clip(np.round(WEIGHT / 0.01), -127, 127).astype(np.int8)
ONES = np.ones(16, np.float32)
CHANNELS = np.ones(3, np.float32)
PLANE = np.array([2, 3])
SQUARE: dict[str, Any] = {"i": np.array([16, 16]), "k": np.array([3, 3])}
STORED: dict[str, Any] = {"w": INT8_WEIGHT, "t": SCALES, "n": np.zeros(8, np.int8)}

STORED_WEIGHT = "k = DequantizeLinear<axis=0>(w, t, n)"
POSITIVE = "m = ReduceMax<keepdims=0>(x) c = Greater(m, v)"
THROUGH_INT8 = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"


@dataclass(frozen=True)
class Pair:
    """A graph that breaks `rule`, and one that does not."""

    rule: str
    broken: ModelProto
    twin: ModelProto
    says: str
    """What TensorRT-RTX says of the broken one, in part; empty where it takes it."""


def graph(text: str, *, opset: int = 20, domain: str = "", **constants: Any) -> ModelProto:
    """`text` is `(inputs) => (outputs) { nodes }` in ONNX's own notation; functions may follow."""
    imports = f'"" : {opset}' + (f', "{domain}" : 1' if domain else "")
    model = onnx.parser.parse_model(f"<ir_version: 10, opset_import: [{imports}]> g {text}")
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return model


def qdq(nodes: str, **constants: Any) -> ModelProto:
    """`nodes` make y from d, the image behind int8 with scale `s` and zero point `z`."""
    return graph(f"{IMAGE} {{ {THROUGH_INT8} {nodes} }}", **({"s": SCALE, "z": np.int8(0)} | constants))


def stored(**constants: Any) -> ModelProto:
    """A convolution whose weight is stored in int8, with a scale for each channel."""
    return graph(f"{IMAGE} {{ {STORED_WEIGHT} y = Conv(x, k) }}", **(STORED | constants))


def conv(image: str, weight: Any, bias: Any, *, opset: int = 22) -> ModelProto:
    """A convolution and a ReLU."""
    return graph(f"{image} {{ h = Conv(x, w, b) y = Relu(h) }}", opset=opset, w=weight, b=bias)


def attention(kind: str) -> ModelProto:
    """Two heads, 16 tokens."""
    ports = ", ".join(f"{kind}[batch,2,16,32] {name}" for name in "qkv")
    return graph(f"({ports}) => ({kind}[] y) {{ y = Attention(q, k, v) }}", opset=23)


def resize(attributes: str) -> ModelProto:
    """To twice the size."""
    return graph(f"{IMAGE} {{ y = Resize<{attributes}>(x, , , n) }}", n=np.array([1, 3, 32, 32]))


def pool(operator: str, step: int) -> ModelProto:
    """Over windows of 3, whose elements lie `step` apart."""
    return graph(f"{IMAGE} {{ y = {operator}<kernel_shape=[3, 3], dilations=[{step}, {step}]>(x) }}")


def scatter(operator: str, reduction: str) -> ModelProto:
    """Into the first row."""
    text = f'(float[1,8] x, float[1,8] u) => (float[] y) {{ y = {operator}<reduction="{reduction}">(x, i, u) }}'
    return graph(text, i=np.zeros((1, 1) if operator == "ScatterND" else (1, 8), np.int64))


def in_function(node: str) -> ModelProto:
    """`node` makes b from a in a function of the model's own."""
    square = "i = Constant<value_ints=[16, 16]>() k = Constant<value_ints=[3, 3]>()"
    function = f'<domain: "local", opset_import: ["" : 20]> f (a) => (b) {{ {square} {node} }}'
    return graph(f"{COLUMNS} {{ y = local.f(x) }} {function}", domain="local")


def in_branch(nodes: str) -> ModelProto:
    """`nodes` make o, of shape n, from x in one branch of an If."""
    one = f"one () => (float[1,3,16,16] o) {{ {nodes} }}"
    other = "other () => (float[1,3,16,16] p) { l = ReduceMin<keepdims=0>(x) p = Expand(l, n) }"
    choice = f"{POSITIVE} y = If(c) <then_branch = {one}, else_branch = {other}>"
    return graph(f"(float[1,27,196] x) => (float[] y) {{ {choice} }}", v=ZERO, n=np.array([1, 3, 16, 16]), **SQUARE)


NET = conv(IMAGE, WEIGHT, BIAS)
QUANTISED_NET = qdq(f"{STORED_WEIGHT} y = Conv(d, k, b)", **STORED, b=BIAS)
RELU = graph(f"{IMAGE} {{ y = Relu(x) }}")


def errors() -> Iterator[tuple[str, Pair]]:
    """What TensorRT-RTX refuses, by name."""
    yield from _operators()
    yield from _quantisations()
    yield from _conditions()
    yield from _types()


def _operators() -> Iterator[tuple[str, Pair]]:
    broken = graph(f"{COLUMNS} {{ y = Col2Im(x, i, k) }}", **SQUARE)
    yield "operator", Pair("operator", broken, graph(f"{COLUMNS} {{ y = Relu(x) }}"), "Col2Im")
    broken, twin = (graph(f"(int32[batch,4] x) => (int32[] y) {{ y = {name}(x) }}") for name in ("BitwiseNot", "Abs"))
    yield "bitwise operator", Pair("operator", broken, twin, "BitwiseNot")
    yield "unknown operator", Pair("operator", graph(f"{IMAGE} {{ y = Frobnicate(x) }}"), RELU, "Plugin not found")
    broken, twin = in_function("b = Col2Im(a, i, k)"), in_function("b = Relu(a)")
    yield "operator in a function", Pair("operator", broken, twin, "Col2Im")
    broken, twin = in_branch("o = Col2Im(x, i, k)"), in_branch("h = ReduceMax<keepdims=0>(x) o = Expand(h, n)")
    yield "operator in a branch", Pair("operator", broken, twin, "Col2Im")
    broken = graph(f"{ROWS} {{ q, s, z = DynamicQuantizeLinear(x) y = DequantizeLinear(q, s, z) }}")
    yield "dynamic quantisation", Pair("operator", broken, graph(f"{ROWS} {{ y = Relu(x) }}"), "DynamicQuantizeLinear")
    broken = qdq("r = QLinearConv(q, s, z, w, t, n, s, z) y = DequantizeLinear(r, s, z)", **STORED)
    yield "operator of integers", Pair("operator", broken, QUANTISED_NET, "QLinearConv")
    fused = f"{IMAGE} {{ y = com.microsoft.FusedConv(x, w, b) }}"
    broken = graph(fused, domain="com.microsoft", w=WEIGHT, b=BIAS)
    yield "custom domain", Pair("custom-domain", broken, NET, "FusedConv")


def _quantisations() -> Iterator[tuple[str, Pair]]:
    relu = qdq("y = Relu(d)")
    yield "uint8", Pair("zero-point", qdq("y = Relu(d)", z=np.uint8(128)), relu, "Non-zero zero point")
    yield "asymmetric", Pair("zero-point", qdq("y = Relu(d)", z=np.int8(3)), relu, "Non-zero zero point")
    broken = stored(n=np.arange(8, dtype=np.int8))
    yield "asymmetric weight", Pair("zero-point", broken, stored(), "Non-zero zero point")
    broken = graph(f"{ROWS} {{ m = ReduceMax<keepdims=0>(x) z = Cast<to=3>(m) {THROUGH_INT8} y = Relu(d) }}", s=SCALE)
    twin = graph(f"{ROWS} {{ i = Identity(n) z = Cast<to=3>(i) {THROUGH_INT8} y = Relu(d) }}", s=SCALE, n=0)
    yield "computed zero point", Pair("zero-point", broken, twin, "not an initializer")
    broken = stored(w=INT8_WEIGHT.astype(np.uint8), n=np.zeros(8, np.uint8))
    yield "uint8 weight", Pair("quantised-type", broken, stored(), "UINT8")
    yield "scale of 0", Pair("scale", stored(t=SCALES * (np.arange(8) > 0)), stored(), "must all be positive")
    bias = {"c": np.ones(8, np.int32), "u": SCALES * SCALE, "m": np.zeros(8, np.int32)}
    broken = qdq(f"{STORED_WEIGHT} b = DequantizeLinear<axis=0>(c, u, m) y = Conv(d, k, b)", **STORED, **bias)
    yield "int32 bias", Pair("int32-bias", broken, QUANTISED_NET, "Int32")
    nodes = "r = Reshape(w, h) k = DequantizeLinear(r, s, z) y = Conv(d, k)"
    broken = qdq(nodes, w=INT8_WEIGHT.reshape(8, 27), h=np.array([8, 3, 3, 3]))
    yield "reshaped weight", Pair("quantised-constant", broken, QUANTISED_NET, "only allowed before DQ")


def _conditions() -> Iterator[tuple[str, Pair]]:
    yield "attention", Pair("attention-fp32", attention("float"), attention("float16"), "Attention")
    for operator in ("MaxPool", "AveragePool", "LpPool"):
        broken, twin = pool(operator, 2), pool(operator, 1)
        yield f"dilated {operator}", Pair("pool-dilation", broken, twin, "dilations other than 1")
    broken = graph(f"{IMAGE} {{ y, i = MaxPool<kernel_shape=[3, 3]>(x) }}")
    yield "places of maxima", Pair("extra-output", broken, pool("MaxPool", 1), "outputs for MaxPool")
    broken, twin = (graph(f"{IMAGE} {{ {out} = LayerNormalization(x, l) }}", l=ONES) for out in ("y, m, v", "y"))
    yield "mean of a norm", Pair("extra-output", broken, twin, "outputs for LayerNormalization")
    stretched = resize('mode="linear"')
    yield "antialias", Pair("resize", resize('mode="linear", antialias=1'), stretched, "Antialiasing")
    broken = resize('mode="linear", coordinate_transformation_mode="half_pixel_symmetric"')
    yield "grid", Pair("resize", broken, stretched, "transformationMode")
    broken = resize('mode="linear", keep_aspect_ratio_policy="not_larger"')
    yield "aspect ratio", Pair("resize", broken, stretched, "stretch")
    broken = graph("(float[batch,3,16,16] x, int64[1] a) => (float[] y) { y = ReduceMean(x, a) }")
    twin = graph(f"{IMAGE} {{ y = ReduceMean(x, a) }}", a=PLANE)
    yield "computed axes", Pair("reduce-axes", broken, twin, "Axis input must resolve")
    broken, twin = (graph(f"{IMAGE} {{ y = Dropout(x, r, t) }}", r=SCALE, t=np.bool_(on)) for on in (True, False))
    yield "dropout", Pair("training", broken, twin, "training mode")
    broken = graph(f"{IMAGE} {{ {POSITIVE} y = Dropout(x, , c) }}", v=ZERO)
    yield "computed dropout", Pair("training", broken, twin, "training_mode")
    norm = "BatchNormalization<training_mode={}>(x, a, a, a, a)"
    broken, twin = (graph(f"{IMAGE} {{ y = {norm.format(on)} }}", a=CHANNELS) for on in (1, 0))
    yield "training norm", Pair("training", broken, twin, "training_mode")
    broken = graph(f"{IMAGE} {{ y, m, v, n, w = BatchNormalization(x, a, a, a, a) }}", opset=9, a=CHANNELS)
    yield "old training norm", Pair("extra-output", broken, twin, "outputs for BatchNormalization")
    refusals = {"ScatterND": "ScatterND with reduction", "ScatterElements": "Unsupported reduction type"}
    for operator, says in refusals.items():
        broken, twin = scatter(operator, "add"), scatter(operator, "none")
        yield f"adding {operator}", Pair("scatter-reduction", broken, twin, says)


def _types() -> Iterator[tuple[str, Pair]]:
    broken, twin = (
        graph(f"{ROWS} {{ {THROUGH_INT8} y = Relu(d) }}", opset=21, s=SCALE, z=kind(0)) for kind in (np.int16, np.int8)
    )
    yield "int16", Pair("tensor-type", broken, twin, "import initializer")
    broken, twin = (
        graph(f"{IMAGE} {{ c = Cast<to={kind}>(x) y = Cast<to=1>(c) }}")
        for kind in (TensorProto.UINT8, TensorProto.INT32)
    )
    yield "uint8 inside", Pair("tensor-type", broken, twin, "UINT8 types for intermediate")
    broken = conv(BRAIN_IMAGE, WEIGHT, BIAS)
    yield "bfloat16 image", Pair("mixed-types", broken, conv(BRAIN_IMAGE, *BRAIN), "`kernel` must be of")
    broken = conv(HALF_IMAGE, HALF[0], BIAS)
    yield "float bias", Pair("mixed-types", broken, conv(HALF_IMAGE, *HALF), "`bias` must be of")
    matrix = "(float16[batch,16] x) => (float16[] y) { y = MatMul(x, w) }"
    broken, twin = (graph(matrix, w=np.ones((16, 4), kind)) for kind in (np.float32, np.float16))
    yield "float matrix", Pair("mixed-types", broken, twin, "must have same input types")


def warnings() -> Iterator[tuple[str, Pair]]:
    """What is worth a word though TensorRT-RTX takes it; with DeformConv it is the other way round, see its rule."""
    inputs = "(float[batch,3,16,16] x, float[batch,18,14,14] o) => (float[] y)"
    broken = graph(f"{inputs} {{ y = DeformConv(x, w, o) }}", w=WEIGHT)
    yield "deformed", Pair("operator", broken, NET, "Plugin not found")
    broken = graph(f"{IMAGE} {{ y = com.microsoft.Gelu(x) }}", domain="com.microsoft")
    yield "name of ONNX", Pair("custom-domain", broken, graph(f"{IMAGE} {{ y = Gelu(x) }}"), "")
    for name, outside, inside in (("old", 8, 9), ("new", 26, 25)):
        broken, twin = (conv(IMAGE, WEIGHT, BIAS, opset=opset) for opset in (outside, inside))
        yield name, Pair("opset", broken, twin, "")
    bounds = "(float16[batch,16] x) => (float16[] y) { y = Clip(x, l, h) }"
    broken, twin = (graph(bounds, l=kind(0), h=kind(6)) for kind in (np.float32, np.float16))
    yield "float bounds", Pair("mixed-types", broken, twin, "")
    again = "{0} = QuantizeLinear({1}, s, z) {2} = DequantizeLinear({0}, s, z)"
    orders = (again.format("i", "c", "j") + " y = Relu(j)", "r = Relu(c) " + again.format("i", "r", "y"))
    broken, twin = (qdq(f"{STORED_WEIGHT} c = Conv(d, k, b) {order}", **STORED, b=BIAS) for order in orders)
    yield "quantised before relu", Pair("fused-activation", broken, twin, "")


def read_as_int8() -> Iterator[tuple[str, ModelProto]]:
    """uint8 with zero point 0, said or by default: TensorRT-RTX takes both, and makes int8 of them."""
    yield "zero point 0", qdq("y = Relu(d)", z=np.uint8(0))
    yield "no zero point", graph(f"{IMAGE} {{ q = QuantizeLinear(x, s) y = DequantizeLinear(q, s) }}", s=SCALE)


def positives() -> Iterator[tuple[str, ModelProto]]:
    """What must pass, beside the twins."""
    yield "fp32", NET
    yield "s8, inputs only", QUANTISED_NET
    nodes = f"h = QuantizeLinear<axis=0>(w, t, n) {STORED_WEIGHT.replace('(w', '(h')} y = Conv(d, k, b)"
    yield "float weight through int8", qdq(nodes, **STORED | {"w": WEIGHT}, b=BIAS)
    yield "pooled int8", qdq("p = MaxPool<kernel_shape=[2, 2]>(q) y = DequantizeLinear(p, s, z)")
    for mode in ("nearest", "linear", "cubic"):
        yield f"resize {mode}", resize(f'mode="{mode}"')
    yield "axes behind a cast", graph(f"{IMAGE} {{ a = Cast<to=7>(i) y = ReduceMean(x, a) }}", i=PLANE.astype(np.int32))
    yield "double", graph(f"{ROWS} {{ y = Add(x, c) }}", c=np.ones(1))
    yield "uint8 image", graph("(uint8[batch,3,16,16] x) => (float[] y) { y = Cast<to=1>(x) }")
